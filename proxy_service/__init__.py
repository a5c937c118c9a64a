"""The proxy as a service: environment → settings → run until SIGTERM."""
