// Golden vectors against a running server, with the JDK alone (17 or later), over HTTP.
//   java clients/golden/Check.java http://localhost:8000 clients/golden/golden.json

import java.io.ByteArrayOutputStream;
import java.math.BigDecimal;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

public class Check {
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final String url;

    Check(String url) {
        this.url = url;
    }

    public static void main(String[] arguments) throws Exception {
        var golden = object(Json.parse(Files.readString(Path.of(arguments[1]))));
        var model = object(golden.get("model"));
        double least = number(object(golden.get("tolerance")).get("min_cosine"));
        var check = new Check(arguments[0]);
        var wrong = new ArrayList<String>();
        int texts = 0, pictures = 0;
        for (Object each : (List<?>) golden.get("texts")) {
            var entry = object(each);
            String text = (String) entry.get("text");
            if (!check.text("tokenize_text", text).get("input_ids").equals(entry.get("input_ids"))) {
                wrong.add("input_ids of text " + texts);
            }
            var answer = check.text(model.get("name") + "_text", text);
            if (cosine(answer.get("text_embeds"), entry.get("text_embeds")) < least) {
                wrong.add("text_embeds of text " + texts);
            }
            texts++;
        }
        for (Object each : (List<?>) golden.get("pictures")) {
            var entry = object(each);
            var answer = check.image(model.get("name") + "_image", Base64.getDecoder().decode((String) entry.get("file")));
            if (cosine(answer.get("image_embeds"), entry.get("image_embeds")) < least) {
                wrong.add("image_embeds of " + entry.get("name"));
            }
            if (!answer.get("fingerprint").get(0).toString().equals(model.get("fingerprint"))) {
                wrong.add("fingerprint: another model is served");
            }
            pictures++;
        }
        wrong.forEach(System.out::println);
        System.out.printf("%d texts, %d pictures, %d wrong%n", texts, pictures, wrong.size());
        System.exit(wrong.isEmpty() ? 0 : 1);
    }

    /** A text goes as JSON. */
    private Map<String, List<?>> text(String model, String text) throws Exception {
        String json = "{\"inputs\": [{\"name\": \"text\", \"datatype\": \"BYTES\", \"shape\": [1, 1], \"data\": [" + Json.quote(text) + "]}]}";
        return infer(model, json.getBytes(StandardCharsets.UTF_8), json.getBytes(StandardCharsets.UTF_8).length);
    }

    /** A picture's bytes follow a JSON header, whose length stands in an HTTP header. */
    private Map<String, List<?>> image(String model, byte[] file) throws Exception {
        byte[] header = ("{\"inputs\": [{\"name\": \"image\", \"datatype\": \"UINT8\", \"shape\": [1, " + file.length
            + "], \"parameters\": {\"binary_data_size\": " + file.length + "}}]}").getBytes(StandardCharsets.UTF_8);
        var body = new ByteArrayOutputStream();
        body.write(header);
        body.write(file);
        return infer(model, body.toByteArray(), header.length);
    }

    /** Output name -> its numbers. */
    private Map<String, List<?>> infer(String model, byte[] body, int headerLength) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(url + "/v2/models/" + model + "/infer"))
            .header("Inference-Header-Content-Length", String.valueOf(headerLength))
            .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
        var response = http.send(request, HttpResponse.BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IllegalStateException(model + ": " + response.statusCode() + " " + response.body());
        }
        var outputs = new LinkedHashMap<String, List<?>>();
        for (Object output : (List<?>) object(Json.parse(response.body())).get("outputs")) {
            outputs.put((String) object(output).get("name"), (List<?>) object(output).get("data"));
        }
        return outputs;
    }

    private static double cosine(Object one, Object other) {
        double sum = 0;
        for (int i = 0; i < ((List<?>) one).size(); i++) {
            sum += number(((List<?>) one).get(i)) * number(((List<?>) other).get(i));
        }
        return sum;
    }

    private static double number(Object value) {
        return ((BigDecimal) value).doubleValue();
    }

    @SuppressWarnings("unchecked")
    private static Map<String, Object> object(Object value) {
        return (Map<String, Object>) value;
    }

    /** As much JSON as is needed here; the JDK has none. Numbers stay exact, which the fingerprint needs. */
    private static final class Json {
        private final String text;
        private int at;

        private Json(String text) {
            this.text = text;
        }

        static Object parse(String text) {
            return new Json(text).value();
        }

        static String quote(String text) {
            var quoted = new StringBuilder("\"");
            for (char unit : text.toCharArray()) {
                quoted.append(unit < ' ' || unit == '"' || unit == '\\' ? String.format("\\u%04x", (int) unit) : String.valueOf(unit));
            }
            return quoted.append('"').toString();
        }

        private Object value() {
            switch (peek()) {
                case '{': return members();
                case '[': return elements();
                case '"': return string();
                case 't': at += 4; return true;
                case 'f': at += 5; return false;
                case 'n': at += 4; return null;
                default:
                    int start = at;
                    while (at < text.length() && "+-.eE0123456789".indexOf(text.charAt(at)) >= 0) at++;
                    return new BigDecimal(text.substring(start, at));
            }
        }

        private Map<String, Object> members() {
            var found = new LinkedHashMap<String, Object>();
            at++;
            while (peek() != '}') {
                peek();
                String key = string();
                peek();
                at++;
                found.put(key, value());
                if (peek() == ',') at++;
            }
            at++;
            return found;
        }

        private List<Object> elements() {
            var found = new ArrayList<>();
            at++;
            while (peek() != ']') {
                found.add(value());
                if (peek() == ',') at++;
            }
            at++;
            return found;
        }

        private String string() {
            var found = new StringBuilder();
            for (at++; text.charAt(at) != '"'; at++) {
                char unit = text.charAt(at);
                if (unit != '\\') {
                    found.append(unit);
                    continue;
                }
                char escaped = text.charAt(++at);
                if (escaped == 'u') {
                    found.append((char) Integer.parseInt(text.substring(at + 1, at + 5), 16));
                    at += 4;
                } else {
                    int known = "nrtbf".indexOf(escaped);
                    found.append(known < 0 ? escaped : "\n\r\t\b\f".charAt(known));
                }
            }
            at++;
            return found.toString();
        }

        private char peek() {
            while (Character.isWhitespace(text.charAt(at))) at++;
            return text.charAt(at);
        }
    }
}
