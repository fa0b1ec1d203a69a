"""An HTTP server that speaks the OpenAI interface, in front of the engine.

    POST /v1/completions         a prompt continued
    POST /v1/chat/completions    a conversation continued, through the model's chat template
    POST /v1/embeddings          texts as vectors
    GET  /v1/models              what is served
    GET  /health, /metrics       for whoever watches: load balancers, Prometheus
    GET  /                       a chat page

One process, two threads that matter: the engine's, which computes, and the event loop's, which talks. A request is read
and checked (`requests`), submitted, and its events are put into the loop as they come (`submission`); endpoints shape
them into what the interface promises (`answers`). Whatever ends a request (done, client gone, out of time, shutting
down) cancels it at the engine, so that its blocks are free at the next step.

Needs the `serve` extra: starlette, uvicorn, jinja2, prometheus-client, llguidance.
"""
