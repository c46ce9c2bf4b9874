"""What starts on a device."""
