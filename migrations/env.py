"""How Alembic runs the migrations.

``nla_monitor.store.session`` hands over its connection, inside the transaction that holds the lock. To write a new
revision: ``alembic -x database=sqlite:///scratch.db revision --autogenerate -m "what changes"`` with an ``alembic.ini``
whose ``script_location`` is this folder.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from nla_monitor.errors import ConfigError
from nla_monitor.store.engine import open_engine
from nla_monitor.store.models import OURS, VERSION_TABLE, Base


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Whether Alembic may look at a table: only at ours, whoever else lives in the database."""
    return kind != "table" or name in OURS


def migrate(connection: Connection) -> None:
    """Run what was asked for on ``connection``; each migration in a transaction, unless the caller holds one."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=include_name,
        render_as_batch=True,
        compare_type=True,
        transaction_per_migration=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    database = context.get_x_argument(as_dictionary=True).get("database")
    if database is None:
        raise ConfigError("name the database: alembic -x database=sqlite:///scratch.db ...")
    with open_engine(database).connect() as connection:
        migrate(connection)
