"""DeepSpeed: a supervised worker in DeepSpeed's own environment."""

from pathlib import Path

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.deepspeed_worker.launch import Launch
from localmoe.backends.worker import WorkerBackend
from localmoe.core.events import EventBus
from localmoe.core.request import Request


class DeepSpeedBackend(WorkerBackend):
    """One DeepSpeed engine, of one rank or several.

    Args:
        model: the name it is served under.
        name: the engine's, where a model has several.
        model_path: the checkpoint, a directory in Hugging Face's format.
        config: engine settings.
        python: the interpreter of DeepSpeed's environment, which can import this package.
        bus: where engine states and restarts are published.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "deepspeed",
        model_path: Path,
        config: DeepSpeedConfig,
        python: Path,
        bus: EventBus,
    ) -> None:
        def launch(address: str) -> Launch:
            return Launch(address=address, model=model, checkpoint_path=str(model_path), config=config)

        super().__init__(
            model=model,
            name=name,
            config=config,
            command=command(python, config),
            launch=launch,
            bus=bus,
        )

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        if request.embed:
            return "DeepSpeed's worker gives no embeddings; native and remote engines do"
        if request.sampling.grammar is not None:
            return "DeepSpeed draws without grammars"
        return super().refusal(request)


def command(python: Path, config: DeepSpeedConfig) -> list[str]:
    """What runs the worker; `python` is the interpreter of DeepSpeed's environment."""
    # Isolated: packages of the directory that we were started in, or of the user's, are not the engine's.
    worker = [str(python), "-I", "-m", "localmoe.backends.deepspeed_worker"]
    if not config.gpu_devices:
        return worker
    # A CUDA process sees the GPUs that this names, in this order, and counts them from 0.
    devices = ",".join(map(str, config.gpu_devices))
    return ["env", "CUDA_DEVICE_ORDER=PCI_BUS_ID", f"CUDA_VISIBLE_DEVICES={devices}", *worker]
