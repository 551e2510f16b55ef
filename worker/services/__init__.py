"""A real Apache Kafka and a real Redis without Docker, Java or root, for demo, tests and bench."""
