"""How alembic runs: over the connection, and in the transaction, that `migrate.upgrade` has begun."""

from alembic import context

from localmoe.state.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
