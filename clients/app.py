"""A client as a Flower ClientApp: the same on a device and in every simulation."""

from fedlearn.flower.client import build_client_app

app = build_client_app()
