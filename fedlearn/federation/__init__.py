"""A round: what is sent and answered, how it is driven, and what is kept of it. No network and no Flower here."""
