"""What surrounds every route, in plain ASGI: nothing here holds back a stream.

From the outside in: CORS, request id, request log, metrics, errors in Anthropic's shape, crashes, security, limits,
cache, body limit, routes (`stack`). So a browser's preflight is answered before anybody is asked for a key; every
refusal, 401 and 429 among them, is logged and counted, and can be read by the page that caused it; who asks is known
before anything is counted as theirs; and nobody's body is read before it is known that they may send one.
"""
