package translate

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"sallyport/internal/mesh"
	"sallyport/internal/translate/translatetest"
)

var (
	fromFile = mesh.Translate{To: "grpc", Descriptors: "shop.binpb", Set: translatetest.Set}
	asked    = mesh.Translate{To: "grpc", Reflection: true}
	rest     = mesh.Translate{To: "rest", Descriptors: "shop.binpb", Set: translatetest.Set}
)

// start runs a Translator before the service at addr.
func start(t testing.TB, addr string, spec mesh.Translate) *Translator {
	t.Helper()
	tr, err := New(Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}})
	if err != nil {
		t.Fatal(err)
	}
	o, err := tr.Read(&spec)
	if err != nil {
		t.Fatal(err)
	}
	tr.Use(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tr.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return tr
}

// do calls as the proxy does: the face first, then the connection in memory.
func do(t testing.TB, tr *Translator, r *http.Request) (*http.Response, string) {
	t.Helper()
	f, err := tr.Face(t.Context(), Request{Verb: r.Method, Path: r.URL.EscapedPath(), ContentType: r.Header.Get("Content-Type")})
	if err != nil {
		t.Fatal(err)
	}
	if f.Method == "" || !f.Translated {
		t.Fatalf("%s %s is %+v", r.Method, r.URL, f)
	}
	r.Header.Set(MethodField, f.Method)
	hc := &http.Client{Transport: &http.Transport{
		DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return tr.Connect(ctx) },
	}}
	defer hc.CloseIdleConnections()
	resp, err := hc.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func request(verb, path, contentType, body string) *http.Request {
	r := httptest.NewRequest(verb, "http://shop.test"+path, strings.NewReader(body))
	r.RequestURI = ""
	if body == "" {
		r.Body = http.NoBody
	}
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	r.Header.Set("X-User", "alice")
	return r
}

// compact takes out what JSON may have between its tokens.
func compact(s string) string {
	var b bytes.Buffer
	if json.Compact(&b, []byte(s)) != nil {
		return s
	}
	return b.String()
}

func TestCallsOfRESTReachAServiceOfGRPC(t *testing.T) {
	addr := translatetest.GRPC(t, "127.0.0.1:0")
	for name, spec := range map[string]mesh.Translate{"file": fromFile, "reflection": asked} {
		tr := start(t, addr, spec)
		for _, c := range []struct {
			name, verb, path, body string
			status                 int
			want                   string
		}{
			{"a path variable and a query", "GET", "/v1/items/a?count=3", "", 200, `{"id":"a","price":"0","note":""}`},
			{"an escaped path variable", "GET", "/v1/items/a%20b", "", 200, `{"id":"a b","price":"0","note":""}`},
			{"an escaped percent sign", "GET", "/v1/items/a%2541", "", 200, `{"id":"a%41","price":"0","note":""}`},
			{"a body", "POST", "/v1/items", `{"id":"z","price":7}`, 200, `{"id":"z","price":"7","note":""}`},
			{"no rule of its own", "POST", "/shop.v1.Shop/Plain", `{"id":"q"}`, 200, `{"id":"q","price":"0","note":""}`},
			{"a part of the answer", "GET", "/v1/shelves/shelves/9/items?tag=x&tag=y&like.id=l", "", 200, ""},
			{"an error", "GET", "/v1/items/missing", "", 404, `{"code":5,"message":"no such item: 100%","details":[]}`},
			{"an error with a detail", "GET", "/v1/items/locked", "", 400, `{"code":9,"message":"locked","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"LOCKED","domain":"shop","metadata":{}}]}`},
			{"a status that does not exist", "GET", "/v1/items/odd", "", 500, `{"code":2,"message":"odd","details":[]}`},
			{"an unknown field", "POST", "/v1/items", `{"bogus":1}`, 400, ""},
			{"a field twice", "POST", "/v1/items", `{"id":"a","id":"b"}`, 400, ""},
			{"no JSON", "POST", "/v1/items", `id=1`, 400, ""},
			{"an unknown parameter", "GET", "/v1/items/a?bogus=1", "", 400, ""},
			{"a parameter of the wrong type", "GET", "/v1/items/a?count=x", "", 400, ""},
			{"a body that has no place", "GET", "/v1/items/a", `{"id":"z"}`, 400, ""},
			{"a message too large", "POST", "/v1/items", `{"note":"` + strings.Repeat("x", MaxMessage) + `"}`, 413, ""},
			{"an answer too large", "GET", "/v1/items/huge", "", 429, ""},
		} {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				ct := ""
				if c.body != "" {
					ct = "application/json"
				}
				resp, body := do(t, tr, request(c.verb, c.path, ct, c.body))
				if resp.StatusCode != c.status || c.want != "" && compact(body) != c.want {
					t.Errorf("%d %s, want %d %s", resp.StatusCode, body, c.status, c.want)
				}
				if resp.Header.Get("Content-Type") != "application/json" {
					t.Errorf("type %q", resp.Header.Get("Content-Type"))
				}
				var st struct{ Code int }
				if c.status >= 400 && (json.Unmarshal([]byte(body), &st) != nil || st.Code == 0) {
					t.Errorf("no google.rpc.Status: %s", body)
				}
			})
		}
	}
}

func TestPartOfAnAnswerIsWhatTheRuleSays(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	_, body := do(t, tr, request("GET", "/v1/shelves/shelves/9/items?tag=x&tag=y&like.id=l", "", ""))
	var items []struct{ ID, Note string }
	if err := json.Unmarshal([]byte(body), &items); err != nil || len(items) != 1 || items[0].ID != "shelves/9" ||
		items[0].Note != `{"shelf":"shelves/9","tag":["x","y"],"like":{"id":"l"}}` {
		t.Errorf("got %s, %v", body, err)
	}
}

func TestMetadataAndTimeGoBothWays(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	r := request("GET", "/v1/items/note", "", "")
	r.Header.Set("X-Server-Timeout", "30")
	resp, body := do(t, tr, r)
	if want := "user=[alice] peer=[] judged=[] timed=true"; !strings.Contains(body, want) {
		t.Errorf("the service saw %s, want %s", body, want)
	}
	if resp.Header.Get("Shop-Header") != "h" || resp.Header.Get("Grpc-Trailer-Shop-Trailer") != "t" {
		t.Errorf("the caller saw %v", resp.Header)
	}
	for field, value := range map[string]string{"X-Server-Timeout": "0.05", "Grpc-Timeout": "50m"} {
		r = request("GET", "/v1/items/hang", "", "")
		r.Header.Set(field, value)
		if resp, body = do(t, tr, r); resp.StatusCode != 504 || !strings.Contains(body, `"code":4`) {
			t.Errorf("%s: %d %s", field, resp.StatusCode, body)
		}
	}
	for _, bad := range []string{"-1", "NaN", "soon"} {
		r = request("GET", "/v1/items/a", "", "")
		r.Header.Set("X-Server-Timeout", bad)
		if resp, body = do(t, tr, r); resp.StatusCode != 400 {
			t.Errorf("a timeout of %s: %d %s", bad, resp.StatusCode, body)
		}
	}
}

func TestStreamsAreLinesOrEvents(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	const one, two = `{"id":"a","price":"0","note":""}`, `{"id":"a","price":"1","note":""}`
	for _, c := range []struct {
		name, path, accept, kind, want, status string
		code                                   int
	}{
		{"lines", "/v1/items/a:watch?count=2", "", "application/x-ndjson", one + "\n" + two + "\n", "0", 200},
		{"events", "/v1/items/a:watch?count=2", "text/event-stream", "text/event-stream", "data: " + one + "\n\ndata: " + two + "\n\n", "0", 200},
		{"nothing", "/v1/items/a:watch", "", "application/x-ndjson", "", "0", 200},
		{"an error at once", "/v1/items/missing:watch", "", "application/json", `{"code":5,"message":"no such item: 100%","details":[]}`, "", 404},
		{"an error in the middle", "/v1/items/break:watch?count=1", "", "application/x-ndjson",
			`{"id":"break","price":"0","note":""}` + "\n" + `{"error":{"code":15,"message":"broken","details":[]}}` + "\n", "15", 200},
		{"an error among events", "/v1/items/break:watch?count=1", "text/event-stream", "text/event-stream",
			`data: {"id":"break","price":"0","note":""}` + "\n\n" + `event: error` + "\n" + `data: {"error":{"code":15,"message":"broken","details":[]}}` + "\n\n", "15", 200},
		{"a body of its own", "/v1/items/a:download", "", "text/plain", "one two", "0", 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := request("GET", c.path, "", "")
			if c.accept != "" {
				r.Header.Set("Accept", c.accept)
			}
			resp, body := do(t, tr, r)
			// protojson writes a space here and there, so that nobody relies on it.
			if got := strings.ReplaceAll(strings.ReplaceAll(body, `, "`, `,"`), `": `, `":`); resp.StatusCode != c.code || got != strings.ReplaceAll(c.want, `": `, `":`) {
				t.Errorf("%d %q, want %d %q", resp.StatusCode, got, c.code, c.want)
			}
			if resp.Header.Get("Content-Type") != c.kind || resp.Trailer.Get("Grpc-Status") != c.status {
				t.Errorf("type %q, trailer %v", resp.Header.Get("Content-Type"), resp.Trailer)
			}
		})
	}
	resp, body := do(t, tr, request("POST", "/v1/items:fill", "application/json", `{}`))
	if resp.StatusCode != 501 || !strings.Contains(body, "stream of requests") {
		t.Errorf("a stream of requests: %d %s", resp.StatusCode, body)
	}
}

// frame is a message of gRPC as it is sent.
func frame(t testing.TB, m proto.Message) string {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b)))) + string(b)
}

func TestCallsOfGRPCWebReachAServiceOfGRPC(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	get := func(id string) string {
		return frame(t, translatetest.Message(t, "GetRequest", `{"id":"`+id+`","count":2}`))
	}
	for _, c := range []struct {
		name, method, body string
		messages           int
		status             string
	}{
		{"one", "Get", get("a"), 1, "0"},
		{"a stream", "Watch", get("a"), 2, "0"},
		{"an error", "Get", get("missing"), 0, "5"},
		{"an error in the middle", "Watch", get("break"), 2, "15"},
		{"two messages", "Get", get("a") + get("a"), 0, "3"},
		{"half a message", "Get", get("a")[:4], 0, "3"},
		{"no message", "Get", "", 0, "3"},
		{"a message too large", "Get", "\x00\xff\xff\xff\xff", 0, "8"},
		{"a stream of requests", "Fill", frame(t, translatetest.Message(t, "Item", `{}`)), 0, "12"},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, body := do(t, tr, request("POST", "/shop.v1.Shop/"+c.method, "application/grpc-web+proto", c.body))
			if resp.StatusCode != 200 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/grpc-web") {
				t.Fatalf("%d %v", resp.StatusCode, resp.Header)
			}
			messages, end := 0, resp.Header.Get("Grpc-Status")
			for b := []byte(body); len(b) >= prefix; {
				n := binary.BigEndian.Uint32(b[1:])
				if b[0] == 0x80 {
					_, after, _ := strings.Cut(string(b[prefix:prefix+n]), "Grpc-Status: ")
					end, _, _ = strings.Cut(after, "\r")
				} else {
					messages++
				}
				b = b[prefix+n:]
			}
			if messages != c.messages || end != c.status {
				t.Errorf("%d messages and status %q, want %d and %q: %q %v", messages, end, c.messages, c.status, body, resp.Header)
			}
		})
	}
}

func TestWhatARequestMeans(t *testing.T) {
	grpc, rest := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile), start(t, "127.0.0.1:1", rest)
	for _, c := range []struct {
		name                    string
		tr                      *Translator
		verb, path, contentType string
		want                    Face
		fails                   bool
	}{
		{"gRPC for gRPC is left alone", grpc, "POST", translatetest.Get, "application/grpc", Face{Method: translatetest.Get}, false},
		{"gRPC in JSON is not", grpc, "POST", translatetest.Get, "application/grpc+json", Face{Method: translatetest.Get, Translated: true}, false},
		{"gRPC-Web", grpc, "POST", translatetest.Get, "application/grpc-web", Face{Method: translatetest.Get, Translated: true, Web: true}, false},
		{"another format", grpc, "POST", translatetest.Get, "application/grpc+thrift", Face{}, true},
		{"gRPC with GET", grpc, "GET", translatetest.Get, "application/grpc", Face{}, false},
		{"an unknown method", grpc, "POST", "/shop.v1.Shop/Drop", "application/grpc", Face{}, false},
		{"REST", grpc, "GET", "/v1/items/a", "", Face{Method: translatetest.Get, Translated: true, REST: true}, false},
		{"a verb behind a colon", grpc, "GET", "/v1/items/a:watch", "", Face{Method: "/shop.v1.Shop/Watch", Translated: true, REST: true}, false},
		{"REST with the wrong verb", grpc, "DELETE", "/v1/items/a", "", Face{Translated: true, REST: true}, false},
		{"REST for a method with a rule", grpc, "POST", translatetest.Get, "application/json", Face{Translated: true, REST: true}, false},
		{"REST nobody knows", grpc, "GET", "/admin", "", Face{Translated: true, REST: true}, false},
		{"gRPC for REST", rest, "POST", translatetest.Get, "application/grpc", Face{Method: translatetest.Get, Translated: true}, false},
		{"gRPC in JSON for REST", rest, "POST", translatetest.Get, "application/grpc+json", Face{}, true},
		{"REST for REST is judged as the method", rest, "GET", "/v1/items/a", "", Face{Method: translatetest.Get, REST: true}, false},
		{"an escaped byte that means nothing", rest, "GET", "/v1/items/a%20b", "", Face{Method: translatetest.Get, REST: true}, false},
		{"an escaped verb, which the service may decode first", rest, "GET", "/v1/items/a%3Awatch", "", Face{REST: true}, false},
		{"an empty segment, which the service may take for none", rest, "GET", "/v1/items/", "", Face{REST: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.tr.Face(t.Context(), Request{c.verb, c.path, c.contentType})
			if got != c.want || (err != nil) != c.fails {
				t.Errorf("%+v, %v, want %+v", got, err, c.want)
			}
		})
	}
}

func TestNothingIsServedThatWasNotJudged(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	for _, judged := range []string{"", "/shop.v1.Shop/Put", "/shop.v1.Shop/Drop"} {
		w := httptest.NewRecorder()
		r := request("GET", "/v1/items/a", "", "")
		r.Header.Set(MethodField, judged)
		tr.ServeHTTP(w, r)
		if w.Code < 500 {
			t.Errorf("judged as %q: %d %s", judged, w.Code, w.Body)
		}
	}
}

func TestNothingIsServedWhileNobodyKnowsTheMethods(t *testing.T) {
	tr := start(t, "127.0.0.1:1", asked)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if f, err := tr.Face(ctx, Request{"POST", translatetest.Get, "application/grpc"}); err == nil || f.Method != "" {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestDescriptorsThatSayNothingAreRefused(t *testing.T) {
	tr, err := New(Config{Log: slog.New(slog.DiscardHandler), Dial: func(context.Context) (net.Conn, error) { return nil, net.ErrClosed }})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spec mesh.Translate
		want string
	}{
		"no descriptors":           {mesh.Translate{To: "grpc", Set: []byte("shop")}, "FileDescriptorSet"},
		"nothing in them":          {mesh.Translate{To: "grpc"}, "no service"},
		"a service they have not":  {mesh.Translate{To: "grpc", Set: translatetest.Set, Services: []string{"shop.v1.Bank"}}, "they have [shop.v1.Shop]"},
		"a REST that is reflected": {mesh.Translate{To: "rest", Reflection: true}, "no reflection"},
	} {
		if _, err := tr.Read(&c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRequestsOfAllCallsAreBounded(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	if !tr.bodies.Take(maxBodies) {
		t.Fatal("nothing may be held")
	}
	for _, contentType := range []string{"application/json", "application/grpc-web"} {
		r := request("POST", "/v1/items", contentType, `{"id":"a"}`)
		if contentType != "application/json" {
			r = request("POST", translatetest.Get, contentType, frame(t, translatetest.Message(t, "GetRequest", `{"id":"a"}`)))
		}
		resp, body := do(t, tr, r)
		if code := resp.Header.Get("Grpc-Status"); resp.StatusCode != 503 && code != "14" {
			t.Errorf("%s: %d %s %s", contentType, resp.StatusCode, code, body)
		}
	}
	tr.bodies.Give(maxBodies)
	before, w := tr.bodies.Used(), httptest.NewRecorder()
	r := request("POST", "/v1/items", "application/json", `{"id":"a"}`)
	r.Header.Set(MethodField, "/shop.v1.Shop/Put")
	if tr.ServeHTTP(w, r); w.Code != 200 || tr.bodies.Used() > before {
		t.Errorf("%d %s, %d bytes are held", w.Code, w.Body, tr.bodies.Used())
	}
}

// A body that unpacks to much counts as what it unpacks to, not as what came.
func TestWhatARequestUnpacksToIsBounded(t *testing.T) {
	tr := start(t, translatetest.GRPC(t, "127.0.0.1:0"), fromFile)
	var log bytes.Buffer
	tr.server.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(&log, nil), slog.LevelError)
	const leaves = 100 << 10
	if !tr.bodies.Take(maxBodies - leaves) {
		t.Fatal("nothing may be held")
	}
	used := tr.bodies.Used()
	pack := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		_, _ = z.Write(b)
		z.Close()
		return out.Bytes()
	}
	for _, n := range []int{10, 2 * leaves} {
		text := `{"id":"a","note":"` + strings.Repeat("x", n) + `"}`
		rest := request("POST", "/v1/items", "application/json", string(pack([]byte(text))))
		rest.Header.Set("Content-Encoding", "gzip")
		m := pack([]byte(frame(t, translatetest.Message(t, "Item", text)))[prefix:])
		head := binary.BigEndian.AppendUint32([]byte{1}, uint32(len(m)))
		grpc := request("POST", "/shop.v1.Shop/Put", "application/grpc-web", string(head)+string(m))
		grpc.Header.Set("Grpc-Encoding", "gzip")
		for _, r := range []*http.Request{rest, grpc} {
			resp, body := do(t, tr, r)
			code, status := resp.Header.Get("Grpc-Status"), resp.StatusCode
			if want := n == 10; (status == 200 && (code == "" || code == "0")) != want {
				t.Errorf("%d bytes to %s: %d %s %q", n, r.URL.Path, status, code, body)
			}
		}
	}
	for tr.bodies.Used() != used { // each call gives back as its last deed
		runtime.Gosched()
	}
	if err := tr.server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if log.Len() > 0 {
		t.Errorf("a connection ended with %s", &log)
	}
}
