-- The ledger application's tables: what ordinary applications have (plain tables, partitions, identity, generated
-- columns, sequences), and two tables without a unique constraint, so that a write that happens twice is seen.
-- Run once by the superuser in the application's database; {owner} is replaced by the application's role, {accounts}
-- by the number of accounts.
SET ROLE {owner};
SET search_path = public;

CREATE TABLE ledger (
    id bigint NOT NULL,
    client int NOT NULL,
    seq bigint NOT NULL,
    port int NOT NULL DEFAULT current_setting('port')::int,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE ledger REPLICA IDENTITY FULL;
CREATE SEQUENCE ledger_seq CACHE 1;

CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ledger bigint NOT NULL,
    amount int NOT NULL,
    gross int GENERATED ALWAYS AS (amount * 119 / 100) STORED
);

CREATE TABLE branches (id int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE tellers (id int PRIMARY KEY, branch int NOT NULL REFERENCES branches, balance bigint NOT NULL);
CREATE TABLE accounts (id int PRIMARY KEY, branch int NOT NULL, balance bigint NOT NULL) PARTITION BY HASH (id);
CREATE TABLE accounts_0 PARTITION OF accounts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE accounts_1 PARTITION OF accounts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE SEQUENCE history_id;
CREATE TABLE history (
    id bigint NOT NULL DEFAULT nextval('history_id'),
    kind text NOT NULL,
    ledger bigint NOT NULL,
    delta int NOT NULL,
    PRIMARY KEY (id, kind)
) PARTITION BY LIST (kind);
CREATE TABLE history_deposit PARTITION OF history FOR VALUES IN ('deposit');
CREATE TABLE history_withdrawal PARTITION OF history FOR VALUES IN ('withdrawal');
CREATE TABLE history_attack PARTITION OF history FOR VALUES IN ('attack');

INSERT INTO branches SELECT n, 0 FROM generate_series(1, 10) n;
INSERT INTO tellers SELECT n, (n - 1) / 10 + 1, 0 FROM generate_series(1, 100) n;
INSERT INTO accounts SELECT n, (n - 1) % 10 + 1, 0 FROM generate_series(1, {accounts}) n;

-- What writers around the proxy aim at.
CREATE TABLE attack (id bigint NOT NULL, kind text NOT NULL);
ALTER TABLE attack REPLICA IDENTITY FULL;
CREATE TABLE attack_truncated (id bigint PRIMARY KEY);
RESET ROLE;
