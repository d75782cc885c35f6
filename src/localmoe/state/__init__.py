"""What outlives a server: keys, stored answers, files, jobs. In SQLite, or in PostgreSQL."""
