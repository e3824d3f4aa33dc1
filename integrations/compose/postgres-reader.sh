#!/bin/sh
# The role as which Grafana reads the store: it can change nothing, whatever SQL somebody types into a panel.
# The image of PostgreSQL runs this once, with an empty data folder.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  --set password="$NLA_MONITOR_READER_PASSWORD" --set role="${NLA_MONITOR_READER:-nla_reader}" <<'SQL'
CREATE ROLE :"role" LOGIN PASSWORD :'password';
GRANT pg_read_all_data TO :"role";
ALTER ROLE :"role" SET default_transaction_read_only = on;
ALTER ROLE :"role" SET statement_timeout = '30s';
SQL
