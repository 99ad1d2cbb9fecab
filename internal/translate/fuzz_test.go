package translate

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

// FuzzTimeout: a time that is accepted is not below zero and not without end.
func FuzzTimeout(f *testing.F) {
	for _, s := range []string{"1S", "99999999H", "0n", "1", "-1S", "1e3S"} {
		f.Add(s, "")
		f.Add("", s)
	}
	f.Add("", "1.5")
	f.Fuzz(func(t *testing.T, grpc, seconds string) {
		for _, rest := range []bool{false, true} {
			h := http.Header{"Grpc-Timeout": {grpc}, "X-Server-Timeout": {seconds}}
			d, bounded, err := timeoutOf(h, rest)
			if err == nil && (d < 0 || d > maxTimeout || !bounded && d != 0) {
				t.Errorf("%q %q is %v", grpc, seconds, d)
			}
		}
	})
}

// FuzzMessages: what is read of a stream is what its prefixes say, and no more.
func FuzzMessages(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x01a\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x01\x00\x00\x00\x01a"))
	f.Add([]byte("\x00\xff\xff\xff\xffa"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var buf []byte
		var err error
		for read := 0; ; {
			if buf, err = readMessage(r, buf); err != nil {
				break
			}
			if read += prefix + len(buf); read != len(b)-r.Len() {
				t.Fatalf("read %d bytes for %d", len(b)-r.Len(), read)
			}
		}
		one, err := io.ReadAll(&single{held: &held{ReadCloser: io.NopCloser(bytes.NewReader(b))}})
		if !bytes.HasPrefix(b, one) {
			t.Errorf("%q became %q, %v", b, one, err)
		}
		if first, bad := readMessage(bytes.NewReader(b), nil); bad == nil && len(one) != prefix+len(first) {
			t.Errorf("one message of %d bytes is %d", len(first), len(one))
		}
	})
}

// FuzzFailure: whatever a service of REST says of an error is one for gRPC.
func FuzzFailure(f *testing.F) {
	f.Add(404, []byte(`{"code":5,"message":"x","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo"}]}`))
	f.Add(400, []byte(`{"error":{"code":400,"status":"FAILED_PRECONDITION","message":"x"}}`))
	f.Add(503, []byte(`{"error":"x","code":17}`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		if status < 100 || status > 599 || status/100 == 2 {
			return
		}
		got := failureOf(status, body)
		if got.code == codes.OK || got.code > codes.Unauthenticated || len(got.text) > 2<<10 {
			t.Errorf("%d %q is %+v", status, body, got)
		}
		if !json.Valid(statusText(got.code, got.text, got.details)) {
			t.Errorf("%d %q is written as no JSON", status, body)
		}
		w := httptest.NewRecorder()
		tell(w, got)
		if !json.Valid(w.Body.Bytes()) {
			t.Errorf("%d %q is told as no JSON", status, body)
		}
	})
}

// FuzzMessageText: what grpc-message carries comes back.
func FuzzMessageText(f *testing.F) {
	f.Add("100% \n\u00e9")
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8(s, "")
		e := escapeMessage(s)
		if strings.ContainsAny(e, "\r\n") || unescapeMessage(e) != s {
			t.Errorf("%q is %q is %q", s, e, unescapeMessage(e))
		}
	})
}

// FuzzPath: no path and no verb means a method that the service does not have, or
// breaks what asks.
func FuzzPath(f *testing.F) {
	tr := start(f, "127.0.0.1:1", fromFile)
	for _, p := range []string{"/v1/items/a", "/v1/items/a:watch", "/v1/items:find", "/", "//", "/v1/items/%", "/v1/shelves/shelves/9/items", "*"} {
		f.Add("GET", p)
	}
	f.Fuzz(func(t *testing.T, verb, path string) {
		face, err := tr.Face(t.Context(), Request{Verb: verb, Path: path})
		if err != nil {
			t.Fatal(err)
		}
		if tab := tr.now.Load().table.Load(); face.Method != "" && tab.methods[face.Method] == nil {
			t.Errorf("%s %q means %q", verb, path, face.Method)
		}
	})
}
