import java.io.StringReader;
import java.net.URI;
import java.sql.Array;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.ResultSetMetaData;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.util.PGobject;

/**
 * pgjdbc: statements that it prepares on the server after two executions, results in binary, cursors by fetch size,
 * batches, COPY, enum, composite and array as objects, hstore as a map, notifications, setQueryTimeout. What load.py says
 * of workers and rounds holds here as well.
 */
public class Pgjdbc {
    static final String NAME = "pgjdbc";
    static final List<String> acknowledged = Collections.synchronizedList(new ArrayList<>());
    static final List<String> errors = Collections.synchronizedList(new ArrayList<>());
    static final List<String> wrong = Collections.synchronizedList(new ArrayList<>());
    static final List<String> notified = Collections.synchronizedList(new ArrayList<>());
    static final CountDownLatch held = new CountDownLatch(1);
    static final CountDownLatch stop = new CountDownLatch(1);
    static final CountDownLatch alone = new CountDownLatch(1);
    static final Map<String, String> TAGS = new HashMap<>();
    static final String PLACE = "(1,\"a, \"\"b\"\"\")";
    static final String[] MOODS = {"sad", null, "so so"};
    static final String[] PLACES = {"(2,c)", "(,\"\")"};

    static void expect(String what, Object found, Object expected) {
        boolean same = found instanceof Object[]
                ? found.getClass() == expected.getClass() && Arrays.equals((Object[]) found, (Object[]) expected)
                : Objects.equals(found, expected);
        if (!same) {
            wrong.add(what + ": " + text(found) + ", not " + text(expected));
        }
    }

    static String text(Object value) {
        String text = value instanceof Object[] ? Arrays.toString((Object[]) value) : String.valueOf(value);
        return (value == null ? "" : value.getClass().getSimpleName() + " ") + text;
    }

    static PGobject object(String type, String value) throws Exception {
        PGobject object = new PGobject();
        object.setType(type);
        object.setValue(value);
        return object;
    }

    static void read(PreparedStatement read) throws Exception {
        read.setInt(1, 1);
        try (ResultSet row = read.executeQuery()) {
            ResultSetMetaData about = row.getMetaData();
            List<String> types = new ArrayList<>();
            for (int n = 1; n <= about.getColumnCount(); n++) {
                types.add(about.getColumnTypeName(n));
            }
            expect("types", types, List.of("driver_mood", "_driver_mood", "driver_place", "_driver_place", "hstore"));
            row.next();
            expect("enum", row.getObject(1), "so so");
            Array moods = row.getArray(2);
            expect("type of an enum array's elements", moods.getBaseTypeName(), "driver_mood");
            expect("enum array", moods.getArray(), MOODS);
            expect("composite", row.getObject(3), object("driver_place", PLACE));
            Object[] places = (Object[]) row.getArray(4).getArray();
            expect("composite array", Arrays.stream(places).map(String::valueOf).toArray(String[]::new), PLACES);
            expect("hstore", row.getObject(5), TAGS);
        }
    }

    /** Its columns are others on 15 and on 17: it is of no use after a flip, until it is prepared anew. */
    static void otherColumns(PreparedStatement others) throws Exception {
        try (ResultSet row = others.executeQuery()) {
            row.next();
            expect("columns of a statement that is kept", row.getMetaData().getColumnCount(), row.getInt(1) < 160000 ? 5 : 8);
        }
    }

    static void giveUp(PreparedStatement insert, String id) throws Exception {
        insert.setQueryTimeout(1);
        insert.setString(1, id);
        try {
            insert.executeUpdate();
            wrong.add("a statement that ran out of time while held went through");
        } catch (SQLException error) {
            expect("setQueryTimeout", error.getSQLState(), "57014");
        }
        insert.setQueryTimeout(0);
    }

    static void end() {
        stop.countDown();
        held.countDown();
    }

    static void work(int number, int busy, String url, Properties properties) throws Exception {
        try (Connection c = DriverManager.getConnection(url, properties); Statement plain = c.createStatement()) {
            plain.execute("set app.tenant = 'kept'");
            plain.execute("set timezone = 'Asia/Tokyo'");
            PreparedStatement insert = c.prepareStatement("insert into driver_ledger (id) values (?)");
            PreparedStatement write = c.prepareStatement(
                    "insert into driver_ledger (id, mood, moods, place, places, tags) values (?, ?, ?, ?, ?, ?)");
            PreparedStatement read =
                    c.prepareStatement("select mood, moods, place, places, tags from driver_sample where id = ?");
            PreparedStatement others = c.prepareStatement(
                    "select current_setting('server_version_num')::int, m.* from pg_auth_members m limit 1");
            PreparedStatement few = c.prepareStatement("select generate_series(1, 10)");
            few.setFetchSize(3);
            boolean idle = number == busy;
            for (int i = 1; ; i++) {
                boolean last = (idle ? alone : stop).getCount() == 0;
                String id = NAME + "/" + number + "/" + i + "/";
                if (idle && i == 2) {
                    if (stop.getCount() > 0) {
                        giveUp(insert, id + 0);
                        System.out.println("gave up");
                    }
                    alone.await();
                    continue;
                }
                if (number == 0) {
                    plain.execute("select pg_notify('" + NAME + "', '" + id + "')");
                    notified.add(id);
                }
                insert.setString(1, id + 0);
                insert.executeUpdate();
                acknowledged.add(id + 0);
                c.setAutoCommit(false);
                for (int k = 1; k <= 2; k++) {
                    insert.setString(1, id + k);
                    insert.addBatch();
                }
                insert.executeBatch();
                write.setString(1, id + 3);
                write.setObject(2, object("driver_mood", "so so"));
                write.setArray(3, c.createArrayOf("driver_mood", MOODS));
                write.setObject(4, object("driver_place", PLACE));
                write.setArray(5, c.createArrayOf("driver_place", PLACES));
                write.setObject(6, TAGS);
                write.executeUpdate();
                int sum = 0;
                try (ResultSet rows = few.executeQuery()) {
                    while (rows.next()) {
                        sum = sum * 2 + rows.getInt(1);
                    }
                }
                expect("cursor", sum, 2036);
                c.commit();
                c.setAutoCommit(true);
                acknowledged.addAll(List.of(id + 1, id + 2, id + 3));
                c.unwrap(PGConnection.class).getCopyAPI()
                        .copyIn("copy driver_ledger (id) from stdin", new StringReader(id + "4\n"));
                acknowledged.add(id + 4);
                read(read);
                otherColumns(others);
                try (ResultSet kept = plain.executeQuery(
                        "select current_setting('app.tenant') || ' ' || current_setting('timezone')")) {
                    kept.next();
                    expect("settings", kept.getString(1), "kept Asia/Tokyo");
                }
                expect("isValid", c.isValid(60), true);
                if (last) {
                    return;
                }
                if (idle) {
                    held.await();
                } else {
                    stop.await(200, TimeUnit.MILLISECONDS);
                }
            }
        }
    }

    static String json(List<String> all) {
        StringBuilder text = new StringBuilder("[");
        for (String one : all) {
            String quoted = one.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n").replace("\t", " ");
            text.append(text.length() > 1 ? ", \"" : "\"").append(quoted).append('"');
        }
        return text.append("]").toString();
    }

    public static void main(String[] arguments) throws Exception {
        TAGS.put("k", "v w");
        TAGS.put("n", null);
        int busy = Integer.parseInt(arguments[arguments.length - 1]);
        URI at = new URI(arguments[arguments.length - 2]);
        Properties properties = new Properties();
        properties.setProperty("user", at.getUserInfo().split(":")[0]);
        properties.setProperty("password", at.getUserInfo().split(":")[1]);
        properties.setProperty("ApplicationName", NAME);
        properties.setProperty("prepareThreshold", "2");
        String url = "jdbc:postgresql://" + at.getHost() + ":" + at.getPort() + at.getPath();
        Thread input = new Thread(() -> {
            try {
                while (System.in.read() >= 0) {
                    held.countDown();
                }
            } catch (Exception error) {
                errors.add(error.toString());
            }
            end();
        });
        input.setDaemon(true);
        input.start();
        Connection listener = DriverManager.getConnection(url, properties);
        Statement listen = listener.createStatement();
        listen.execute("listen " + NAME + "; select pg_advisory_lock(20000, hashtext('" + NAME + "'))");
        List<Thread> workers = new ArrayList<>();
        for (int n = 0; n <= busy; n++) {
            int number = n;
            Thread worker = new Thread(() -> {
                try {
                    work(number, busy, url, properties);
                } catch (Throwable error) {
                    errors.add(error.toString());
                    end();
                }
            });
            worker.start();
            workers.add(worker);
        }
        for (Thread worker : workers.subList(0, busy)) {
            worker.join();
        }
        alone.countDown();
        workers.get(busy).join();
        listen.execute("select 1");
        List<String> heard = new ArrayList<>();
        for (PGNotification one : listener.unwrap(PGConnection.class).getNotifications()) {
            heard.add(one.getParameter());
        }
        expect("notifications", heard, notified);
        String version = listener.getMetaData().getDriverVersion() + ", Java " + System.getProperty("java.version");
        System.out.println("{\"version\": \"" + version + "\", \"acknowledged\": " + json(acknowledged) + ", \"errors\": "
                + json(errors) + ", \"wrong\": " + json(wrong.subList(0, Math.min(5, wrong.size()))) + "}");
    }
}
