-- +goose Up
-- 0x53414c59 is "SALY": it tells our file from another program's database.
PRAGMA application_id = 0x53414c59;

-- expires and at are microseconds since 1970 UTC; expires 0 means never.
CREATE TABLE records (
    kind     TEXT    NOT NULL,
    key      TEXT    NOT NULL,
    value    BLOB    NOT NULL,
    revision INTEGER NOT NULL,
    expires  INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, key)
) STRICT;

CREATE INDEX records_expires ON records (expires) WHERE expires > 0;

-- The newest row is never deleted, so revision always grows.
CREATE TABLE changes (
    revision INTEGER PRIMARY KEY,
    kind     TEXT    NOT NULL,
    key      TEXT    NOT NULL,
    deleted  INTEGER NOT NULL,
    at       INTEGER NOT NULL
) STRICT;

-- +goose Down
DROP TABLE changes;
DROP TABLE records;
