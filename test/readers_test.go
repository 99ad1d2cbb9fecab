package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// readersSum tells how many messages TestReadersAgree tried; it is printed with
// the others.
var readersSum = &conformSum{conformResult: conformResult{Name: "readers agree", OK: true}}

// A reading is what an HTTP server takes a request for.
type reading struct {
	Method, Target, Host string
	Fields               []string // sorted, names in lower case
	Body                 int
}

// oddRequests are legal, and such that programs have read them in different
// ways.
func oddRequests() map[string]string {
	get := func(fields string) string { return strictGet(fields)[0] }
	post := func(fields, body string) string { return strictPost(fields, body)[0] }
	target := func(t string) string { return strictTarget("/v1/strict" + t)[0] }
	method := func(m string) string { return m + " " + strictPath + " HTTP/1.1\r\n" + strictHost + "\r\n" }
	long := func(n int) string { return strings.Repeat("a", n) }
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	return map[string]string{
		"plain": get(""), "HTTP/1.0": "GET " + strictPath + " HTTP/1.0\r\n" + strictHost + "\r\n",
		"absolute":                target("")[:4] + "http://billing.mesh.internal" + strictPath + "?a HTTP/1.1\r\n" + strictHost + "\r\n",
		"absolute in other case":  "GET HTTP://BILLING.mesh.internal" + strictPath + " HTTP/1.1\r\nHost: billing.MESH.internal\r\n\r\n",
		"name of every byte":      get("!#$%&'*+-.^`|~09az: x\r\n"),
		"value of other letters":  get("A: \xc3\xa4\xff\r\n"),
		"empty value":             get("A:\r\nB: \r\n"),
		"blanks around":           get("A: \t b c \t\r\nB:d\r\n"),
		"twice":                   get("A: 1\r\nB: 2\r\nA: 3\r\n"),
		"lists":                   get("Accept: a, b\r\nAccept: c\r\nVia: 1.1 a\r\n"),
		"cookies":                 get("Cookie: a=b; c=\"d\"\r\n"),
		"colons and quotes":       get("A: b:c: \"d\\\"\" ;\r\nB: :\r\n"),
		"long value":              get("A: " + long(7<<10) + "\r\n"),
		"many":                    get(strings.Repeat("A: b\r\n", 80)),
		"coding in a value":       get("X-Note: Transfer-Encoding: chunked\r\n"),
		"length by another name":  post("X-Content-Length: 9\r\nContent-Lengths: 7\r\nContent-Length: 2\r\n", "ab"),
		"coding by another name":  post("Transfer-Encodings: chunked\r\nContent-Length: 2\r\n", "ab"),
		"underscores":             post("Content_Length: 7\r\nTransfer_Encoding: chunked\r\nContent-Length: 2\r\n", "ab"),
		"hop fields":              get("Connection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nProxy-Connection: keep-alive\r\n"),
		"TE":                      get("TE: trailers, gzip\r\nConnection: TE\r\n"),
		"h2c":                     get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"),
		"range":                   get("Range: bytes=0-1,5-\r\nIf-None-Match: W/\"a\", \"b\"\r\nIf-Modified-Since: x\r\n"),
		"length zero":             post("Content-Length: 0\r\n", ""),
		"POST of nothing":         post("", ""),
		"every byte":              post("Content-Length: 256\r\n", string(every)),
		"a request in it":         post(fmt.Sprintf("Content-Length: %d\r\n", len(smuggled)), smuggled),
		"long":                    post("Content-Length: 100000\r\n", long(100_000)),
		"encoded content":         post("Content-Length: 2\r\nContent-Encoding: gzip\r\nContent-Type: a/b;c=\"d\"\r\n", "ab"),
		"expectation":             post("Expect: 100-continue\r\nContent-Length: 2\r\n", "ab"),
		"chunks":                  post(chunkedField, "1\r\na\r\n00F\r\n"+long(15)+"\r\n0\r\n\r\n"),
		"no chunk":                post(chunkedField, "0\r\n\r\n"),
		"chunk extensions":        post(chunkedField, "2;a;b=c;d=\"e\"\r\nab\r\n0;f\r\n\r\n"),
		"chunks with trailers":    post(chunkedField+"Trailer: A\r\n", "2\r\nab\r\n0\r\nA: b\r\nContent-Length: 9\r\n\r\n"),
		"a chunk that looks last": post(chunkedField, "7\r\n0\r\n\r\nGE\r\n0\r\n\r\n"),
		"many chunks":             post(chunkedField, strings.Repeat("1\r\na\r\n", 3000)+"0\r\n\r\n"),
		"GET with a body":         strictBody("GET", "ab")[0], "DELETE with a body": strictBody("DELETE", smuggled)[0], "OPTIONS with a body": strictBody("OPTIONS", "ab")[0],
		"PUT": method("PUT"), "DELETE": method("DELETE"), "OPTIONS": method("OPTIONS"), "PATCH": method("PATCH"), "PROPFIND": method("PROPFIND"), "M-SEARCH": method("M-SEARCH"),
		"doubled slashes": target("//x///y"), "dots": target("/./x/."), "escapes": target("/%78%c3%a4%20%2520"), "marks": target("/!$&'()*+,=:@~-._"), "brackets": target("/x[1]|^"),
		"query": target("/x?a=b&c=%2f..//?;:@"), "empty query": target("/x?"), "query of escapes": target("/x?%00%0d%0a"), "query of brackets": target("/x?a[]={}|^"),
		"long target": target("/" + long(7<<10)),
	}
}

// TestReadersAgree sends legal messages through a real sidecar and gives what
// it forwards, byte for byte, to net/http, nginx and HAProxy: they take it for
// the same request, and find the next one where it ends.
func TestReadersAgree(t *testing.T) {
	t.Parallel()
	nginx, haproxy := meshtest.Need(t, "nginx"), meshtest.Need(t, "haproxy")
	s := newStrictRig(t, "")
	readers := map[string]string{}
	direct := httptest.NewServer(readingHandler)
	t.Cleanup(direct.Close)
	readers["net/http"] = direct.Listener.Addr().String()
	readers["nginx"] = s.w.startNginx(nginx, readers["net/http"])
	readers["haproxy"] = s.w.startHAProxy(haproxy, readers["net/http"])
	t.Run("what is refused here they read in different ways", func(t *testing.T) {
		raw := strictPost("Content-Length: 5\r\n"+chunkedField, "0\r\n\r\n")[0]
		if r, err := readBy(readers["net/http"], raw); err != nil || r.Body != 0 {
			t.Fatalf("net/http: %v %+v", err, r)
		}
		if r, err := readBy(readers["nginx"], raw); err == nil {
			t.Errorf("nginx agrees: %+v", r)
		}
	})
	for name, request := range oddRequests() {
		ok := t.Run(name, func(t *testing.T) {
			from := s.app.expect(strictCase{})
			if got := s.throughIn(t, []string{request, again}, nil); got.Status != 200 {
				t.Fatalf("the sidecar answered %d %s", got.Status, got.Body)
			}
			raw := s.app.since(from)[0].raw
			want, err := readBy(readers["net/http"], raw)
			if err != nil {
				t.Fatalf("net/http: %v: %q", err, raw)
			}
			for _, reader := range []string{"nginx", "haproxy"} {
				got, err := readBy(readers[reader], raw)
				if err != nil {
					t.Fatalf("%s: %v: %q", reader, err, raw)
				}
				if !got.same(want) {
					t.Errorf("%s reads\n%+v\nnet/http\n%+v\nof %q", reader, got, want, raw)
				}
			}
		})
		readersSum.one(ok)
	}
}

// one counts one case.
func (s *conformSum) one(ok bool) {
	r := conformResult{OK: ok}
	r.Cases.Tried = 1
	if ok {
		r.Cases.Passed = 1
	} else {
		r.Cases.Failed = 1
	}
	s.add(r)
}

func (r reading) same(o reading) bool {
	return r.Method == o.Method && r.Target == o.Target && r.Host == o.Host && r.Body == o.Body && slices.Equal(r.Fields, o.Fields)
}

const readingField = "X-Reading"

var readingHandler = http.HandlerFunc(tellReading)

// tellReading answers with what the server behind, or the one before it, read.
// What a proxy understood stands in fields of its own.
func tellReading(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return
	}
	got := reading{Method: r.Method, Target: r.RequestURI, Host: r.Host, Body: int(n)}
	for name, values := range r.Header {
		name = strings.ToLower(name)
		switch name {
		// Of the hop between a proxy and this server.
		case "connection", "content-length", "transfer-encoding", "te", "x-read-method", "x-read-host":
			continue
		}
		for _, v := range values {
			got.Fields = append(got.Fields, name+": "+v)
		}
	}
	slices.Sort(got.Fields)
	if m := r.Header.Get("X-Read-Method"); m != "" && m != r.Method || r.Header.Get("X-Read-Host") != "" && r.Header.Get("X-Read-Host") != r.Host {
		got.Method += " read as " + m
	}
	b, err := json.Marshal(got)
	if err != nil {
		return
	}
	if r.Method == http.MethodHead {
		w.Header().Set(readingField, string(b)) // an answer to HEAD has no body
	}
	_, _ = w.Write(b)
}

// readBy has a server read a message, and the next one behind it on the same
// connection.
func readBy(addr, raw string) (r reading, err error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return r, err
	}
	defer c.Close()
	got := converse(c, []string{raw + "GET /next HTTP/1.1\r\nHost: next\r\nConnection: close\r\n\r\n"}, nil)
	if got.Status != 200 {
		return r, fmt.Errorf("status %d %s %s", got.Status, got.Body, got.Err)
	}
	if strings.Contains(raw, "Connection: close\r\n") { // then there is no next
		if got.Rest != "" {
			return r, fmt.Errorf("behind a request that ends the connection came %q", got.Rest)
		}
	} else if _, body, _ := strings.Cut(got.Rest, "\r\n\r\n"); strings.Count(got.Rest, "HTTP/1.1 200") != 1 || !strings.Contains(body, `"/next"`) {
		return r, fmt.Errorf("the next request was read as %q", got.Rest)
	}
	if _, after, ok := strings.Cut(got.Head, readingField+": "); ok {
		got.Body, _, _ = strings.Cut(after, "\r\n")
	}
	return r, json.Unmarshal([]byte(got.Body), &r)
}

// serveBy starts a program and waits until it listens.
func (w *world) serveBy(addr, program string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command(program, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		_ = cmd.Wait() // its status says how it was ended
		if w.t.Failed() {
			w.t.Logf("%s printed:\n%s", filepath.Base(program), out.String())
		}
	})
	w.await("connect to "+filepath.Base(program), func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return addr
}

// startNginx starts nginx as a proxy before a server; it says what it has read.
func (w *world) startNginx(program, behind string) string {
	w.t.Helper()
	addr, dir := freePort(w.t), w.path("nginx")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Chmod(w.dir, 0o755); err != nil { // its workers are other users when it is root
		w.t.Fatal(err)
	}
	file := filepath.Join(dir, "nginx.conf")
	w.put(file, fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  ignore_invalid_headers off; underscores_in_headers on; large_client_header_buffers 8 32k; client_max_body_size 10m;
  server {
    listen %[2]s;
    location / {
      proxy_pass http://%[3]s; proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_set_header Connection "";
      proxy_set_header X-Read-Method $request_method; proxy_set_header X-Read-Host $host;
    }
  }
}
`, dir, addr, behind))
	return w.serveBy(addr, program, "-p", dir, "-e", "stderr", "-c", file)
}

// startHAProxy is startNginx for HAProxy.
func (w *world) startHAProxy(program, behind string) string {
	w.t.Helper()
	addr := freePort(w.t)
	if err := os.MkdirAll(w.path("haproxy"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	file := w.path("haproxy", "haproxy.cfg")
	w.put(file, fmt.Sprintf(`global
  tune.bufsize 65536
  tune.http.maxhdr 256
defaults
  mode http
  timeout connect 10s
  timeout client 30s
  timeout server 30s
listen odd
  bind %s
  http-request set-header X-Read-Method %%[method]
  http-request set-header X-Read-Host %%[req.hdr(host)]
  server behind %s
`, addr, behind))
	return w.serveBy(addr, program, "-db", "-f", file)
}
