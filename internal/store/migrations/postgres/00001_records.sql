-- +goose Up
-- Keys are compared byte by byte, whatever the locale of the server.
-- expires and at are microseconds since 1970 UTC; expires 0 means never.
CREATE TABLE records (
    kind     text COLLATE "C" NOT NULL,
    key      text COLLATE "C" NOT NULL,
    value    bytea  NOT NULL,
    revision bigint NOT NULL,
    expires  bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, key)
);

CREATE INDEX records_expires ON records (expires) WHERE expires > 0;

-- batch marks the transaction, so that a writer whose connection broke during
-- the commit can find out what became of it.
CREATE TABLE changes (
    revision bigint PRIMARY KEY,
    kind     text COLLATE "C" NOT NULL,
    key      text COLLATE "C" NOT NULL,
    deleted  boolean NOT NULL,
    at       bigint  NOT NULL,
    batch    bigint  NOT NULL
);

-- One row. Each writer locks it before anything else and until it commits:
-- revisions are taken and become visible in the same order. A sequence would
-- show a reader revision 8 before 7.
CREATE TABLE head (
    one      boolean PRIMARY KEY DEFAULT true CHECK (one),
    revision bigint  NOT NULL
) WITH (fillfactor = 10);
INSERT INTO head (revision) VALUES (0);

-- +goose Down
DROP TABLE head;
DROP TABLE changes;
DROP TABLE records;
