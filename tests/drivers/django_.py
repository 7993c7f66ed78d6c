"""Django: connections that persist over requests (CONN_MAX_AGE) and are checked at each, the ORM, transactions,
iterator() in a transaction, array and hstore fields. The driver is psycopg 3, with parameters bound by the server."""
from urllib.parse import urlsplit

import django
from django.conf import settings

from load import Load

load = Load("django", django.get_version())
at = urlsplit(load.url)
settings.configure(
    INSTALLED_APPS=["django.contrib.postgres"], USE_TZ=True,
    DATABASES={"default": {
        "TIME_ZONE": "Asia/Tokyo",
        "ENGINE": "django.db.backends.postgresql", "HOST": at.hostname, "PORT": at.port, "USER": at.username,
        "PASSWORD": at.password, "NAME": at.path[1:], "CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {"application_name": load.name, "server_side_binding": True, "prepare_threshold": 2},
    }})
django.setup()

from django.contrib.postgres.fields import ArrayField, HStoreField  # noqa: E402  after setup
from django.core.signals import request_finished, request_started  # noqa: E402
from django.db import connection, models, transaction  # noqa: E402
from django.db.backends.signals import connection_created  # noqa: E402
from psycopg.types import TypeInfo  # noqa: E402


class MoodField(models.TextField):
    def db_type(self, connection) -> str:
        return "driver_mood"


class Sample(models.Model):
    id = models.IntegerField(primary_key=True)
    mood, moods, tags = MoodField(), ArrayField(MoodField()), HStoreField()

    class Meta:
        app_label, db_table, managed = "drivers", "driver_sample", False


class Ledger(models.Model):
    n = models.BigAutoField(primary_key=True)
    id = models.TextField()
    mood, moods, tags = MoodField(null=True), ArrayField(MoodField(), null=True), HStoreField(null=True)

    class Meta:
        app_label, db_table, managed = "drivers", "driver_ledger", False


def prepare(connection, **_) -> None:
    TypeInfo.fetch(connection.connection, "driver_mood").register(connection.connection)
    with connection.cursor() as cursor:
        cursor.execute("set app.tenant = 'kept'")


connection_created.connect(prepare)
VALUES = ("so so", ["sad", None, "so so"], {"k": "v w", "n": None})


def work(number: int) -> None:
    for id in load.rounds(number):
        if id.held:  # giving up is the driver's: see psycopg3.py
            continue
        # What Django does around each request of its own: it closes what may not persist or does not answer.
        request_started.send(sender=None)
        Ledger.objects.create(id=id(0))
        load.acknowledge(id(0))
        with transaction.atomic():
            mood, moods, tags = VALUES
            Ledger.objects.bulk_create([Ledger(id=id(1)), Ledger(id=id(2), mood=mood, moods=moods, tags=tags)])
            found = Sample.objects.order_by("id").values_list("mood", "moods", "tags").iterator(chunk_size=1)
            load.expect("values of an iterator", list(found), [VALUES])
        load.acknowledge(id(1), id(2))
        found = Sample.objects.get(id=1)
        load.expect("values", (found.mood, found.moods, found.tags), VALUES)
        written = Ledger.objects.get(id=id(2), mood="so so", tags__contains={"k": "v w"})
        load.expect("what was written", (written.mood, written.moods, written.tags), VALUES)
        with connection.cursor() as cursor:
            cursor.execute("select current_setting('app.tenant'), current_setting('timezone')")
            load.expect("settings", cursor.fetchone(), ("kept", "Asia/Tokyo"))
        request_finished.send(sender=None)
    connection.close()


load.run(work)
