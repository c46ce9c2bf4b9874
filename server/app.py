"""The aggregating side as a Flower ServerApp: ``flwr run .`` starts it."""

from fedlearn.flower.server import build_server_app

app = build_server_app()
