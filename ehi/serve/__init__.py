"""A service that answers searches of one index over HTTP, and its search page.

    python -m ehi.serve --index=runs/pydocs/index

    limits       what one client, and all of them together, may ask for
    schema       requests and answers: what is validated is what OpenAPI says
    reader       the index as it is now, reopened when another process writes to it
    batches      questions that arrive together become one search
    counters     what Prometheus reads
    app          the paths, their status codes, and the page
    connection   sockets: slow clients, and the end by SIGTERM

Beside what searching needs, it needs the extra `serve`: starlette, uvicorn, httptools,
msgspec and prometheus-client. It never imports jax.
"""
