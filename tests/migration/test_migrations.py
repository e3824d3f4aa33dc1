"""Migrations: equal to the models, up and down with data inside, and nothing of anybody else's is touched."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from nla_monitor.errors import ForeignDatabaseError, SchemaVersionError, StoreError, StoreUnavailableError
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store import session
from nla_monitor.store.engine import open_engine, read, write
from nla_monitor.store.models import OURS, VERSION_TABLE, Base
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import check, downgrade, migrations_folder, prepare, require, upgrade
from tests.store_support import alert, match, reading, run_info, sample


@pytest.fixture
def engine(empty_url: str) -> Iterator[Engine]:
    opened = open_engine(empty_url)
    yield opened
    opened.dispose()


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Engine]:
    opened = open_engine(sqlite_url)
    yield opened
    opened.dispose()


def tables(engine: Engine) -> set[str]:
    with read(engine) as connection:
        return set(inspect(connection).get_table_names())


def fill(engine: Engine) -> dict[str, Any]:
    """Put something into every table that refers to another one; returns what must survive."""
    repository, spool = Repository(engine), SqlSpool(engine)
    repository.start_run(run_info())
    samples = [sample(n) for n in range(6)]
    spool.put(samples)
    spool.lease("me", 4, 60)
    with repository.transaction() as tx:
        tx.add_readings([reading(one) for one in samples[:4]])
        tx.add_matches([match(one) for one in samples[:3]])
        tx.save_alert(alert(samples[0]), [match(one) for one in samples[:3]], "fired")
        tx.ack("me", [one.sample_id for one in samples[:4]])
    return contents(engine)


def contents(engine: Engine) -> dict[str, Any]:
    repository = Repository(engine)
    (shown,) = repository.alerts()
    return {
        "alert": shown,
        "vectors": [one.sample.vector.tobytes() for one in repository.alert_readings(shown.alert_id)],
        "matches": repository.alert_matches(shown.alert_id),
        "samples": repository.samples(),
        "counts": repository.reading_counts(),
        "outbox": repository.outbox_pending(),
    }


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that the package has one migration more, which rebuilds tables that others refer to."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrations_folder(), folder)
    (folder / "versions" / "9999_next.py").write_text(
        textwrap.dedent(
            """
            import sqlalchemy as sa
            from alembic import op

            revision = "9999"
            down_revision = "0004"


            def upgrade():
                with op.batch_alter_table("nla_samples") as batch:
                    batch.alter_column("norm", new_column_name="raw_norm")
                with op.batch_alter_table("nla_alerts") as batch:
                    batch.add_column(sa.Column("owner", sa.String(), nullable=True))


            def downgrade():
                with op.batch_alter_table("nla_alerts") as batch:
                    batch.drop_column("owner")
                with op.batch_alter_table("nla_samples") as batch:
                    batch.alter_column("raw_norm", new_column_name="norm")
            """
        )
    )
    monkeypatch.setattr(session, "migrations_folder", lambda: folder)
    return folder


def difference(engine: Engine) -> list[Any]:
    """What Alembic would change to bring the database to the models."""
    options = {
        "target_metadata": Base.metadata,
        "compare_type": True,
        "version_table": VERSION_TABLE,
        "include_name": lambda name, kind, _: kind != "table" or name in OURS,
    }
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))


def test_the_migrations_make_what_the_models_say(engine: Engine) -> None:
    upgrade(engine)
    assert difference(engine) == []
    assert tables(engine) == OURS


NEWEST = "0004"
"""The newest revision that the package ships; ``next_version`` adds one after it."""


def test_the_history_has_one_head_and_is_a_line() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    assert len(script.get_heads()) == 1
    assert [one.revision for one in script.walk_revisions()][-1] == "0001"


def test_an_upgrade_that_is_not_needed_changes_nothing(engine: Engine) -> None:
    upgrade(engine)
    before = fill(engine)
    upgrade(engine)
    prepare(engine)
    require(engine)
    assert contents(engine) == before
    assert check(engine).ok


def test_everything_comes_down_with_data_inside_and_up_again(engine: Engine) -> None:
    upgrade(engine)
    fill(engine)
    downgrade(engine, "base")
    assert tables(engine) <= {VERSION_TABLE}
    assert check(engine).current is None
    upgrade(engine)
    assert Repository(engine).reading_counts().samples == 0
    fill(engine)


def test_data_survives_the_rebuild_of_tables_that_others_refer_to(engine: Engine, next_version: Path) -> None:
    """SQLite rebuilds by copying and dropping: with foreign keys on, that would delete readings, matches and labels."""
    upgrade(engine, NEWEST)
    before = fill(engine)
    upgrade(engine)
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(raw_norm) FROM nla_samples")).scalar() == 6
        assert connection.execute(text("SELECT count(*) FROM nla_readings")).scalar() == 4
        assert connection.execute(text("SELECT count(*) FROM nla_alert_matches")).scalar() == 3
    downgrade(engine, NEWEST)
    assert contents(engine) == before
    assert difference(engine) == []
    if engine.dialect.name == "sqlite":
        with read(engine) as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_matches_of_the_first_schema_stay_through_the_second_and_back(engine: Engine) -> None:
    upgrade(engine)
    before = fill(engine)
    downgrade(engine, "0001")
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM nla_matches")).scalar() == 3
    upgrade(engine)
    assert contents(engine) == before
    assert difference(engine) == []


def test_samples_and_the_queue_of_the_second_schema_stay_through_the_third_and_back(engine: Engine) -> None:
    """What waits keeps its place; new columns are empty, and stand before the vector where their order counts."""
    upgrade(engine)
    before = fill(engine)
    spool = SqlSpool(engine)
    urgent = sample(9, model="policy", adapter="lora", priority=1.0, screens={"odd": 2.0})
    spool.put([urgent])
    downgrade(engine, "0002")
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM nla_samples")).scalar() == 7
        assert connection.execute(text("SELECT count(*) FROM nla_spool WHERE state = 'waiting'")).scalar() == 3
    upgrade(engine)
    assert difference(engine) == []
    waiting = [one.sample_id for one in spool.lease("me", 9, 60).samples]
    assert waiting[-1] == urgent.sample_id, "its priority went with the columns: it came last"
    with read(engine) as connection:
        row = connection.execute(text("SELECT model, adapter, priority, screens FROM nla_samples")).all()
        columns = [column["name"] for column in inspect(connection).get_columns("nla_samples")]
    assert set(row) == {(None, None, None, None)}
    assert engine.dialect.name != "sqlite" or columns[-1] == "vector"
    kept = {one.sample_id for one in before["samples"]}
    after = contents(engine)
    assert {one.sample_id for one in after["samples"]} == kept | {urgent.sample_id}
    assert {name: after[name] for name in ("alert", "vectors", "matches", "outbox")} == {
        name: before[name] for name in ("alert", "vectors", "matches", "outbox")
    }


def test_a_migration_that_fails_leaves_everything_as_it_was(engine: Engine, next_version: Path) -> None:
    upgrade(engine, NEWEST)
    before = fill(engine)
    script = next_version / "versions" / "9999_next.py"
    script.write_text(script.read_text().replace("def downgrade", "    op.execute('nonsense')\n\n\ndef downgrade"))
    with pytest.raises(StoreError):
        upgrade(engine)
    assert contents(engine) == before
    assert check(engine).current == NEWEST


def test_a_migration_that_breaks_a_reference_is_undone(sqlite: Engine, next_version: Path) -> None:
    upgrade(sqlite, NEWEST)
    before = fill(sqlite)
    script = next_version / "versions" / "9999_next.py"
    script.write_text(
        script.read_text().replace("def downgrade", "    op.execute('DELETE FROM nla_alerts')\n\n\ndef downgrade")
    )
    with pytest.raises(StoreError, match="without what they refer to"):
        upgrade(sqlite)
    assert contents(sqlite) == before


def test_an_older_schema_is_upgraded_in_a_file_and_refused_on_a_server(engine: Engine, next_version: Path) -> None:
    upgrade(engine, NEWEST)
    before = fill(engine)
    with pytest.raises(SchemaVersionError, match=rf"revision {NEWEST}\) is older.*nla-monitor db upgrade"):
        require(engine)
    if engine.dialect.name == "sqlite":
        prepare(engine)
        assert check(engine).current == "9999"
    else:
        with pytest.raises(SchemaVersionError, match="nla-monitor db upgrade"):
            prepare(engine)
        assert contents(engine) == before


def test_first_use_makes_a_file_ready_and_asks_for_the_command_on_a_server(engine: Engine) -> None:
    status = check(engine)
    assert (status.ok, status.current) == (False, None)
    assert "nla-monitor db upgrade" in status.message
    if engine.dialect.name == "sqlite":
        prepare(engine)
        assert check(engine).ok
    else:
        with pytest.raises(SchemaVersionError, match="nla-monitor db upgrade"):
            prepare(engine)
        assert tables(engine) == set()


def test_a_newer_schema_is_left_alone(engine: Engine) -> None:
    upgrade(engine)
    with write(engine) as connection:
        connection.execute(text("UPDATE nla_alembic_version SET version_num = '9999'"))
    assert check(engine).newer
    for act in (prepare, require, upgrade, lambda one: downgrade(one, "base")):
        with pytest.raises(SchemaVersionError, match=r"9999\) is newer.*upgrade the package"):
            act(engine)
    assert tables(engine) == OURS


def test_a_revision_that_does_not_exist_is_an_error_of_ours(sqlite: Engine) -> None:
    upgrade(sqlite)
    with pytest.raises(SchemaVersionError, match="nowhere"):
        downgrade(sqlite, "nowhere")


def test_our_tables_live_beside_anothers_and_leave_them_alone(engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE experiments (n INTEGER)"))
        connection.execute(text("INSERT INTO experiments VALUES (7)"))
    upgrade(engine)
    assert check(engine).strangers == ("experiments",)
    assert difference(engine) == []
    prepare(engine)
    downgrade(engine, "base")
    with read(engine) as connection:
        assert connection.execute(text("SELECT n FROM experiments")).scalar() == 7


def test_first_use_does_not_move_into_somebody_elses_file(sqlite: Engine) -> None:
    with write(sqlite) as connection:
        connection.execute(text("CREATE TABLE experiments (n INTEGER)"))
    with pytest.raises(ForeignDatabaseError, match=r"experiments.*db upgrade"):
        prepare(sqlite)
    assert tables(sqlite) == {"experiments"}


def test_tables_with_our_prefix_that_are_not_ours_are_foreign(sqlite: Engine) -> None:
    with write(sqlite) as connection:
        connection.execute(text("CREATE TABLE nla_runs (n INTEGER)"))
    for act in (check, prepare, upgrade):
        with pytest.raises(ForeignDatabaseError, match="nla_runs"):
            act(sqlite)


def test_a_read_only_database_can_be_checked_but_not_upgraded(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with write(open_engine(url)) as connection:
        connection.execute(text("PRAGMA user_version=1"))
    reader = open_engine(url, read_only=True)
    assert check(reader).current is None
    with pytest.raises(StoreUnavailableError, match="read-only"):
        upgrade(reader)


def test_eight_processes_may_use_a_new_file_for_the_first_time_at_once(tmp_path: Path) -> None:
    script = """
import os, sys
from nla_monitor.store.session import check, open_engine, prepare
from nla_monitor.store.repository import Repository
children = []
for n in range(8):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine = open_engine(f"sqlite:///{sys.argv[1]}/new.db")
            prepare(engine)
            Repository(engine).add_drops("run", {"queue_full": 1})
            code = 0 if check(engine).ok else 2
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)  # noqa: PLW1510
    assert done.stdout.strip() == str([0] * 8), done.stderr
    assert Repository(open_engine(f"sqlite:///{tmp_path}/new.db")).drops() == {"queue_full": 8}


@pytest.mark.services
def test_several_processes_may_upgrade_a_server_at_once(postgres_url: str) -> None:
    script = """
import os, sys
from nla_monitor.store.session import check, open_engine, upgrade
children = []
for n in range(4):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine = open_engine(sys.argv[1])
            upgrade(engine)
            code = 0 if check(engine).ok else 2
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    done = subprocess.run([sys.executable, "-c", script, postgres_url], capture_output=True, text=True, timeout=120)  # noqa: PLW1510
    assert done.stdout.strip() == str([0] * 4), done.stderr


def test_an_installed_package_uses_the_migrations_that_came_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "nla_monitor" / "_migrations"
    monkeypatch.setattr(session, "__file__", str(tmp_path / "nla_monitor" / "store" / "session.py"))
    with pytest.raises(StoreError, match="install nla-monitor again"):
        migrations_folder()
    beside = tmp_path / "migrations"
    shutil.copytree(Path(__file__).parents[2] / "migrations", beside)
    assert migrations_folder() == beside
    shutil.copytree(beside, inside)
    assert migrations_folder() == inside
