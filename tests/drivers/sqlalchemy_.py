"""SQLAlchemy: its queue pool, the ORM with enum, enum array and hstore columns, streamed results. The driver is
psycopg2, with which SQLAlchemy registers hstore itself."""
import enum

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, ENUM, HSTORE
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column

from load import Load

load = Load("sqlalchemy", sa.__version__)


class Mood(enum.Enum):
    sad, ok, so_so = "sad", "ok", "so so"


MOOD = ENUM(Mood, name="driver_mood", create_type=False, values_callable=lambda moods: [mood.value for mood in moods])
VALUES = (Mood.so_so, [Mood.sad, None, Mood.so_so], {"k": "v w", "n": None})


class Base(DeclarativeBase):
    pass


class Sample(Base):
    __tablename__ = "driver_sample"
    id = mapped_column(sa.Integer, primary_key=True)
    mood = mapped_column(MOOD)
    moods = mapped_column(ARRAY(MOOD))
    tags = mapped_column(HSTORE)


class Ledger(Base):
    __tablename__ = "driver_ledger"
    n = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    id = mapped_column(sa.Text)
    mood = mapped_column(MOOD)
    moods = mapped_column(ARRAY(MOOD))
    tags = mapped_column(HSTORE)


engine = sa.create_engine(load.url.replace("postgresql:", "postgresql+psycopg2:"), pool_size=load.busy + 1,
                          max_overflow=0, pool_pre_ping=True, connect_args={"application_name": load.name})


@sa.event.listens_for(engine, "connect")
def prepare(connection, _record) -> None:
    with connection.cursor() as cursor:
        cursor.execute("set app.tenant = 'kept'; set timezone = 'Asia/Tokyo'")
    connection.commit()


def work(number: int) -> None:
    for id in load.rounds(number):
        if id.held:  # giving up is the driver's: see psycopg2_.py
            continue
        with Session(engine) as session, session.begin():
            session.add_all([Ledger(id=id(0)), Ledger(id=id(1))])
            mood, moods, tags = VALUES
            session.add(Ledger(id=id(2), mood=mood, moods=moods, tags=tags))
        load.acknowledge(id(0), id(1), id(2))
        with Session(engine) as session:
            found = session.scalars(sa.select(Sample).where(Sample.id == 1)).one()
            load.expect("values", (found.mood, found.moods, dict(found.tags)), VALUES)
            few = session.execute(sa.text("select generate_series(1, 10)"), execution_options={"yield_per": 3})
            load.expect("streamed", [row[0] for row in few], list(range(1, 11)))
        with engine.connect() as connection:
            kept = connection.execute(sa.text("select current_setting('app.tenant'), current_setting('timezone')")).one()
            load.expect("settings", tuple(kept), ("kept", "Asia/Tokyo"))
            written = connection.execute(
                sa.select(Ledger.mood, Ledger.moods, Ledger.tags).where(Ledger.id == id(2))).one()
            load.expect("what was written", tuple(written), VALUES)


load.run(work)
