-- Tables of a jobs store, format 1. Rows are only appended to `events` and `results`, and `jobs` is
-- in the order of submission, so one commit writes few pages.

CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE definitions (
    name TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    memory INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    backoff INTEGER NOT NULL,       -- times in milliseconds
    max_backoff INTEGER NOT NULL,
    lease INTEGER NOT NULL,
    deadline INTEGER NOT NULL,
    concurrency INTEGER NOT NULL,
    code BLOB,                      -- SHA-256 of the workers' code
    unstable BLOB                   -- the ids of two jobs with different results
) WITHOUT ROWID;

CREATE TABLE jobs (
    key INTEGER PRIMARY KEY,        -- time and counter of the id
    tail INTEGER NOT NULL,          -- the random bits of the id
    definition TEXT NOT NULL,
    version INTEGER NOT NULL,
    state INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    due INTEGER NOT NULL,           -- milliseconds since 1970
    expires INTEGER,
    ended INTEGER,
    event INTEGER NOT NULL,         -- the position of the newest event
    detail TEXT NOT NULL,
    action BLOB,                    -- SHA-256 of definition, version and input
    input BLOB NOT NULL,
    CHECK ((ended IS NOT NULL) = (state >= 5))
);

CREATE TABLE events (
    position INTEGER PRIMARY KEY,   -- from 1, without gaps
    previous INTEGER NOT NULL,      -- the event of the same job before it
    job INTEGER NOT NULL,
    tail INTEGER NOT NULL,
    definition TEXT NOT NULL,
    state INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    at INTEGER NOT NULL,
    detail TEXT NOT NULL
);

CREATE TABLE results (
    key INTEGER PRIMARY KEY,        -- the job
    tail INTEGER NOT NULL,
    digest INTEGER NOT NULL,        -- the first bits of SHA-256 of the output
    result BLOB,                    -- the key under which it is remembered
    output BLOB NOT NULL
);
