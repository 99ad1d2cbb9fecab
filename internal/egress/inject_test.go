package egress

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
)

const credential = "sk_live_0123456789abcdef"

// injected is the destination of a site whose requests for charges get the
// credential.
func (s *site) injected(host string) string {
	return s.originated(host) + "    inject: {secret: shop, header: Authorization, prefix: \"Bearer \", paths: [/v1/charges/**]}\n"
}

// injectWorld has the credential in a file, which it returns.
func injectWorld(t *testing.T) (*world, *site, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(credential+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startSite(t, "shop.test")
	w := newWorld(t, func(c *Config) { c.Secrets = NewSecrets(map[string]SecretSource{"shop": {File: file}}) })
	w.use(w.policy(asking, s.injected("shop.test")))
	return w, s, file
}

func TestCredentialsAreInjectedWhereTheyBelong(t *testing.T) {
	w, s, _ := injectWorld(t)
	c := w.askOnStream(w.streamsOn(billing))
	for path, want := range map[string]string{"/v1/charges/7": "Bearer " + credential, "/v1/charges": "Bearer " + credential, "/v1/other": ""} {
		res, body := c.ask(t, "GET http://shop.test"+path+" HTTP/1.1\r\nHost: shop.test\r\nAuthorization: Bearer of-the-workload\r\nAccept-Encoding: gzip\r\nRange: bytes=0-3\r\n\r\n")
		r := <-s.seen
		if got := strings.Join(r.Header.Values("Authorization"), ","); res.StatusCode != 200 || body != "served" || got != want {
			t.Errorf("%s: %d %q, the site saw %q", path, res.StatusCode, body, got)
		}
		if want != "" && (r.Header.Get("Accept-Encoding") != "" || r.Header.Get("Range") != "") {
			t.Errorf("%s: the site may hide the credential: %v", path, r.Header)
		}
	}
	if strings.Contains(w.lines(), credential) {
		t.Error("the credential is in the records")
	}
}

// TestCredentialsAreForWhomRowsAllow has a policy that only observes let others ask.
func TestCredentialsAreForWhomRowsAllow(t *testing.T) {
	for _, mode := range []string{"observe", "warn"} {
		w, s, _ := injectWorld(t)
		w.use(w.policy(asking, s.injected("shop.test")+"    mode: "+mode+"\n"))
		c := w.askOnStream(w.streamsOn(inventory))
		if res, _ := c.ask(t, "GET http://shop.test/v1/other HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 {
			t.Errorf("%s: without the credential: %d", mode, res.StatusCode)
		}
		<-s.seen
		res, _ := c.ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n")
		if res.StatusCode != 503 || res.Header.Get("Sallyport-Decision") == "" || len(s.seen) != 0 {
			t.Errorf("%s: %d, %d requests got there", mode, res.StatusCode, len(s.seen))
		}
		w.until("a refusal", denial(ReasonSecret))
		if res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 {
			t.Errorf("%s: whom a row allows: %d", mode, res.StatusCode)
		}
		if r := <-s.seen; r.Header.Get("Authorization") != "Bearer "+credential {
			t.Errorf("%s: whom a row allows: %v", mode, r.Header)
		}
	}
}

func TestAnswersDoNotShowTheCredential(t *testing.T) {
	w, s, _ := injectWorld(t)
	stars := strings.Repeat("*", len(credential))
	for name, answer := range map[string]http.HandlerFunc{
		"whole": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("X-Echo", r.Header.Get("Authorization"))
			_, _ = io.WriteString(rw, `{"auth":"`+r.Header.Get("Authorization")+`"}`)
		},
		"in chunks of one byte": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("X-Echo", r.Header.Get("Authorization"))
			rw.Header().Set("Trailer", "X-Late")
			for _, b := range []byte(`{"auth":"` + r.Header.Get("Authorization") + `"}`) {
				_, _ = rw.Write([]byte{b})
				_ = http.NewResponseController(rw).Flush()
			}
			rw.Header().Set("X-Late", r.Header.Get("Authorization"))
		},
		"to the end of the connection": func(rw http.ResponseWriter, r *http.Request) {
			c, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			auth := r.Header.Get("Authorization")
			fmt.Fprintf(c, "HTTP/1.1 200 %s\r\nX-Echo: %[1]s\r\n\r\n{\"auth\":\"%[1]s\"}", auth)
		},
		"early": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("X-Echo", r.Header.Get("Authorization"))
			rw.WriteHeader(http.StatusEarlyHints)
			_, _ = io.WriteString(rw, `{"auth":"`+r.Header.Get("Authorization")+`"}`)
		},
	} {
		s.does(answer)
		res, body := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n")
		<-s.seen
		if res.StatusCode != 200 || body != `{"auth":"Bearer `+stars+`"}` || res.Header.Get("X-Echo") != "Bearer "+stars || strings.Contains(res.Status, credential) || res.Trailer.Get("X-Late") != map[bool]string{true: "Bearer " + stars}[len(res.Trailer) > 0] {
			t.Errorf("%s: %s %v %q %v", name, res.Status, res.Header, body, res.Trailer)
		}
	}
	for _, codings := range [][]string{{"gzip"}, {"identity, gzip"}, {"identity", "gzip"}, {"", "gzip"}} {
		s.does(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header()["Content-Encoding"] = codings
			_, _ = io.WriteString(rw, "anything")
		})
		if res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 502 {
			t.Errorf("%q: %d", codings, res.StatusCode)
		}
		<-s.seen
	}
}

// TestRecordsDoNotShowTheCredential has a host name it as the coding of its answer.
func TestRecordsDoNotShowTheCredential(t *testing.T) {
	w, s, _ := injectWorld(t)
	for _, before := range []string{"", strings.Repeat("x", 50)} { // what is cut in the middle of it is no less secret
		s.does(func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Encoding", before+strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
			_, _ = io.WriteString(rw, "anything")
		})
		if res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 502 {
			t.Errorf("answered with %d", res.StatusCode)
		}
		<-s.seen
		w.until("the end", func(r audit.Record) bool {
			return r.Kind == audit.KindEgressClose && strings.Contains(r.Detail, "the answer is \""+before+"***")
		})
	}
	if strings.Contains(w.lines(), credential[:8]) {
		t.Errorf("recorded %s", w.lines())
	}
}

// TestErrorsDoNotShowTheCredential in the records of what came to nothing.
func TestErrorsDoNotShowTheCredential(t *testing.T) {
	for name, end := range map[string]func(*fetch, error){
		"before a try": func(f *fetch, err error) { f.unlent(err) },
		"after a try":  func(f *fetch, err error) { f.tries = 1; f.unlent(err) },
		"in a try":     func(f *fetch, err error) { f.note = err.Error(); f.failed(err, http1.Result{}) },
	} {
		w := newWorld(t, nil)
		f := &fetch{tunnel: &tunnel{who: &caller{id: billing}, relay: relay{cancel: func() {}}}, g: w.gw, a: &asker{abort: func() {}}, req: new(http1.Request)}
		f.a.ex.Scrub = http1.NewScrub(credential)
		end(f, refuse(ReasonDial, "%s is what it is told", strings.Repeat("x", 50)+credential))
		if got := w.lines(); strings.Contains(got, credential[:8]) || !strings.Contains(got, "x***") {
			t.Errorf("%s: recorded %s", name, got)
		}
	}
}

func TestWithoutTheCredentialNothingIsSent(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "too short": "short", "of two lines": "0123456789\r\nX-Evil: yes"} {
		w, s, file := injectWorld(t)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n")
		if res.StatusCode != 503 || res.Header.Get("Sallyport-Decision") == "" || s.connected() != 0 {
			t.Errorf("%s: %d, %d connections", name, res.StatusCode, s.connected())
		}
		w.until("a refusal", denial(ReasonSecret))
		if strings.Contains(w.lines(), "X-Evil") {
			t.Errorf("%s: recorded %s", name, w.lines())
		}
	}
}

func TestSecretsAreRead(t *testing.T) {
	vault := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-Vault-Token") != "s.token":
			rw.WriteHeader(403)
		case r.URL.Path == "/v1/secret/data/shop":
			fmt.Fprintf(rw, `{"data":{"data":{"value":%q},"metadata":{}}}`, credential)
		case r.URL.Path == "/v1/kv/shop":
			fmt.Fprintf(rw, `{"data":{"value":%q}}`, credential)
		case r.URL.Path == "/v1/elsewhere":
			http.Redirect(rw, r, "/v1/kv/shop", http.StatusFound)
		default:
			fmt.Fprint(rw, `{"errors":["`+credential+`"]}`)
		}
	}))
	defer vault.Close()
	dir := t.TempDir()
	token, ca := filepath.Join(dir, "token"), filepath.Join(dir, "ca.pem")
	for file, text := range map[string][]byte{token: []byte("s.token\n"), ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vault.Certificate().Raw})} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SHOP_SECRET", credential)
	at := func(path, token, ca string) SecretSource {
		return SecretSource{Vault: &VaultSource{URL: vault.URL + path, Field: "value", TokenFile: token, CAFile: ca}}
	}
	s := NewSecrets(map[string]SecretSource{
		"env": {Env: "SHOP_SECRET"}, "second": at("/v1/secret/data/shop", token, ca), "first": at("/v1/kv/shop", token, ca),
		"no-env": {Env: "SHOP_NOTHING"}, "no-file": {File: filepath.Join(dir, "none")}, "moved": at("/v1/elsewhere", token, ca),
		"other": at("/v1/other", token, ca), "stranger": at("/v1/kv/shop", token, ""), "denied": at("/v1/kv/shop", ca, ca),
	})
	for _, name := range []string{"env", "second", "first"} {
		if v, err := s.Value(t.Context(), name); v != credential || err != nil {
			t.Errorf("%s: %q, %v", name, v, err)
		}
	}
	for _, name := range []string{"no-env", "no-file", "moved", "other", "stranger", "denied", "unknown"} {
		if v, err := s.Value(t.Context(), name); v != "" || err == nil || strings.Contains(err.Error(), credential) {
			t.Errorf("%s: %q, %v", name, v, err)
		}
	}
}

// TestSecretsAreKeptFromNobody has the caller that a secret is read for go away.
func TestSecretsAreKeptFromNobody(t *testing.T) {
	asked, answer := make(chan bool), make(chan bool)
	vault := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		asked <- true
		<-answer
		fmt.Fprintf(rw, `{"data":{"value":%q}}`, credential)
	}))
	defer vault.Close()
	dir := t.TempDir()
	token, ca := filepath.Join(dir, "token"), filepath.Join(dir, "ca.pem")
	for file, text := range map[string][]byte{token: []byte("s.token\n"), ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vault.Certificate().Raw})} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := NewSecrets(map[string]SecretSource{"shop": {Vault: &VaultSource{URL: vault.URL, Field: "value", TokenFile: token, CAFile: ca}}})
	gone, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() { _, err := s.Value(gone, "shop"); left <- err }()
	<-asked
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who has gone got %v", err)
	}
	got := make(chan string)
	for range 2 {
		go func() { v, _ := s.Value(t.Context(), "shop"); got <- v }()
	}
	answer <- true
	for range 2 {
		if v := <-got; v != credential {
			t.Errorf("another got %q", v)
		}
	}
}
