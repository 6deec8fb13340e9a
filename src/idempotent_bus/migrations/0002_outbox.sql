-- Version 2: the outbox. A database of version 1 has records, tokens and the inbox.
--
-- The blocks of one database run in their order, each passing over what is there already. {outbox} is the table with its
-- schema, {name} without.

-- name: postgresql 1
CREATE TABLE IF NOT EXISTS {outbox} (
  id BIGSERIAL NOT NULL PRIMARY KEY,
  inner_msg_id UUID NOT NULL,
  order_key UUID,
  owner UUID,
  made_at BIGINT NOT NULL,
  due_at BIGINT NOT NULL,
  lease_ends BIGINT NOT NULL,
  attempts INTEGER NOT NULL,
  state SMALLINT NOT NULL,
  exchange VARCHAR(255) NOT NULL,
  routing_key VARCHAR(255) NOT NULL,
  content_type VARCHAR(255) NOT NULL,
  content_encoding VARCHAR(255) NOT NULL,
  headers TEXT NOT NULL,
  options TEXT NOT NULL,
  last_error TEXT,
  body BYTEA NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

-- name: postgresql 2
CREATE INDEX IF NOT EXISTS {name}_due ON {outbox} (state, due_at, id);

-- name: postgresql 3
CREATE UNIQUE INDEX IF NOT EXISTS {name}_message ON {outbox} (inner_msg_id);

-- name: postgresql 4
CREATE INDEX IF NOT EXISTS {name}_order ON {outbox} (order_key, id) WHERE order_key IS NOT NULL;

-- name: mysql 1
CREATE TABLE IF NOT EXISTS {outbox} (
  id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
  inner_msg_id BINARY(16) NOT NULL,
  order_key BINARY(16),
  owner BINARY(16),
  made_at BIGINT NOT NULL,
  due_at BIGINT NOT NULL,
  lease_ends BIGINT NOT NULL,
  attempts INTEGER NOT NULL,
  state SMALLINT NOT NULL,
  exchange VARCHAR(255) NOT NULL,
  routing_key VARCHAR(255) NOT NULL,
  content_type VARCHAR(255) NOT NULL,
  content_encoding VARCHAR(255) NOT NULL,
  headers LONGTEXT NOT NULL,
  options LONGTEXT NOT NULL,
  last_error LONGTEXT,
  body LONGBLOB NOT NULL,
  KEY {name}_due (state, due_at, id),
  UNIQUE KEY {name}_message (inner_msg_id),
  KEY {name}_order (order_key, id)
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- name: sqlite 1
CREATE TABLE IF NOT EXISTS {outbox} (
  id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  inner_msg_id BLOB NOT NULL,
  order_key BLOB,
  owner BLOB,
  made_at BIGINT NOT NULL,
  due_at BIGINT NOT NULL,
  lease_ends BIGINT NOT NULL,
  attempts INTEGER NOT NULL,
  state SMALLINT NOT NULL,
  exchange VARCHAR(255) NOT NULL,
  routing_key VARCHAR(255) NOT NULL,
  content_type VARCHAR(255) NOT NULL,
  content_encoding VARCHAR(255) NOT NULL,
  headers TEXT NOT NULL,
  options TEXT NOT NULL,
  last_error TEXT,
  body BLOB NOT NULL
);

-- name: sqlite 2
CREATE INDEX IF NOT EXISTS {name}_due ON {outbox} (state, due_at, id);

-- name: sqlite 3
CREATE UNIQUE INDEX IF NOT EXISTS {name}_message ON {outbox} (inner_msg_id);

-- name: sqlite 4
CREATE INDEX IF NOT EXISTS {name}_order ON {outbox} (order_key, id) WHERE order_key IS NOT NULL;
