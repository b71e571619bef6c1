"""S3 servers on free loopback ports: moto, a real gateway, and a proxy that misbehaves."""
