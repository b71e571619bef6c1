"""S3 servers of the suite's own, on free loopback ports: moto, a real gateway, and a proxy that misbehaves."""
