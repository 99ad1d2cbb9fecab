package egress

import (
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
)

const wantsWebSocket = "GET http://shop.test/v1/ws HTTP/1.1\r\nHost: shop.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"

// echoes has a site become a WebSocket when it is asked to, and send back what it
// gets.
func (s *site) echoes() {
	s.does(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" {
			_, _ = io.WriteString(rw, "no upgrade")
			return
		}
		c, buf, err := rw.(http.Hijacker).Hijack()
		if err != nil {
			s.t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
		_, _ = io.Copy(c, buf)
	})
}

// upgraded asks for a WebSocket, and gives the status.
func (c *askConn) upgraded(t *testing.T) int {
	t.Helper()
	if _, err := io.WriteString(c, wantsWebSocket); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(c.br, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode
}

func (c *askConn) echo(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c.br, b); err != nil || string(b) != text {
		t.Fatalf("%q came back, %v", b, err)
	}
}

func TestWebSockets(t *testing.T) {
	for name, ask := range map[string]func(*world) *askConn{
		"HTTP/1.1": (*world).askOn1,
		"streams":  func(w *world) *askConn { return w.askOnStream(w.streamsOn(billing)) },
		"a tunnel": func(w *world) *askConn { return w.askInside(dialStream, "shop.test:80") },
	} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorld(t)
			s.echoes()
			c := ask(w)
			if code := c.upgraded(t); code != 200 {
				t.Errorf("where it is not allowed: %d", code)
			} else if _, err := c.br.Discard(len("no upgrade")); err != nil {
				t.Fatal(err)
			}
			w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
			c = ask(w)
			if code := c.upgraded(t); code != 101 {
				t.Fatalf("status %d", code)
			}
			c.echo(t, strings.Repeat("ping", 1000))
			w.gw.Rejudge()
			c.echo(t, "still there")
			w.use(w.policy(asking, s.originated("shop.test")))
			w.gw.Rejudge()
			if _, err := io.Copy(io.Discard, c.br); err == nil && name != "a tunnel" {
				t.Error("it ended in order when it was not allowed any more")
			}
			end := w.until("its end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
			if end.BytesUp != 4011 || end.BytesDown != 4011 || !strings.Contains(end.Detail, "status 101") || end.Path != "/v1/ws" {
				t.Errorf("recorded %+v", end)
			}
		})
	}
}

// TestWebSocketsEnd in order, and are recorded with what went through them.
func TestWebSocketsEnd(t *testing.T) {
	w, s := askWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
	c := w.open1(billing)
	a := &askConn{c, c.br}
	if code := a.upgraded(t); code != 101 {
		t.Fatalf("status %d", code)
	}
	a.echo(t, "ping")
	c.Close()
	w.until("its end", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonDone) && r.BytesUp == 4 && r.BytesDown == 4
	})
}

// TestWebSocketsAreOfTheBudget end when that is used up.
func TestWebSocketsAreOfTheBudget(t *testing.T) {
	w, s := askWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n    budget: {up: 100000}\n"))
	c := w.askOnStream(w.streamsOn(billing))
	if code := c.upgraded(t); code != 101 {
		t.Fatalf("status %d", code)
	}
	go func() { _, _ = io.Copy(io.Discard, c.br) }()
	piece := make([]byte, 1000)
	for range 1000 {
		if _, err := c.Write(piece); err != nil {
			break
		}
	}
	end := w.until("its end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonBudget) })
	if end.BytesUp < 5000 || end.BytesUp > 100_000 {
		t.Errorf("%d bytes went up of 10000", end.BytesUp)
	}
}

// TestWhatComesWithTheUpgradeCounts: a host may send all it has behind the head of
// its 101, before anybody reads from it again.
func TestWhatComesWithTheUpgradeCounts(t *testing.T) {
	const size = 3000
	for budget, want := range map[string]Reason{"": ReasonDone, "    budget: {down: 20000}\n": ReasonBudget} {
		w, s := askWorld(t)
		s.does(func(rw http.ResponseWriter, _ *http.Request) {
			c, _, err := rw.(http.Hijacker).Hijack()
			if err != nil {
				s.t.Error(err)
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+rightProof+"\r\n"+strings.Repeat("x", size))
		})
		w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"+budget))
		conn := w.open1(billing)
		c := &askConn{conn, conn.br}
		if code := c.upgraded(t); code != 101 {
			t.Fatalf("status %d", code)
		}
		_, _ = io.CopyN(io.Discard, c.br, size) // or it is broken off before
		conn.Close()
		end := w.until("its end", func(r audit.Record) bool {
			return r.Kind == audit.KindEgressClose && strings.Contains(r.Detail, "status 101") && r.Path == "/v1/ws" && r.Reason == string(want)
		})
		if end.BytesDown != size {
			t.Errorf("%q: %d bytes are recorded", budget, end.BytesDown)
		}
	}
}

// TestWebSocketsAreInspected are those in TLS that ends at the gateway.
func TestWebSocketsAreInspected(t *testing.T) {
	w, s, roots := inspectWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.inspected("shop.test")+"    upgrade: [websocket]\n"))
	if err := w.gw.cfg.Inspector.Use(w.snap.Load()); err != nil {
		t.Fatal(err)
	}
	c, err := w.askTLS(dialStream, "shop.test:443", &tls.Config{RootCAs: roots, ServerName: "shop.test"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, strings.Replace(wantsWebSocket, "http://shop.test", "", 1)); err != nil {
		t.Fatal(err)
	}
	if res, err := http.ReadResponse(c.br, nil); err != nil || res.StatusCode != 101 {
		t.Fatalf("%v %+v", err, res)
	}
	c.echo(t, "ping")
}

// TestWebSocketsCarryNoCredential is a request that would get one, which goes on
// without an upgrade.
func TestWebSocketsCarryNoCredential(t *testing.T) {
	w, s, _ := injectWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.injected("shop.test")+"    upgrade: [websocket]\n"))
	c := w.askOnStream(w.streamsOn(billing))
	res, body := c.ask(t, strings.Replace(wantsWebSocket, "/v1/ws", "/v1/charges/ws", 1))
	if res.StatusCode != 200 || body != "no upgrade" {
		t.Errorf("%d %q", res.StatusCode, body)
	}
	if r := <-s.seen; r.Header.Get("Upgrade") != "" || r.Header.Get("Authorization") != "Bearer "+credential {
		t.Errorf("the site saw %v", r.Header)
	}
	w.until("a word of it", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && strings.HasSuffix(r.Detail, "no WebSocket since it has a credential")
	})
}

const rightProof = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"

// TestWebSocketsAreAskedForAsTheyAre refuses what only looks like it.
func TestWebSocketsAreAskedForAsTheyAre(t *testing.T) {
	const key, version = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", "Sec-WebSocket-Version: 13\r\n"
	w, s := askWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
	h := w.streamsOn(billing)
	for name, fields := range map[string]string{
		"no key":             version,
		"no version":         key,
		"another version":    key + "Sec-WebSocket-Version: 8\r\n",
		"two versions":       key + version + version,
		"two keys":           key + key + version,
		"a short key":        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n" + version,
		"a key of 17 bytes":  "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSE=\r\n" + version,
		"a key of 18 bytes":  "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSEh\r\n" + version,
		"a key of something": "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZ*==\r\n" + version,
		"an empty key":       "Sec-WebSocket-Key:\r\n" + version,
	} {
		c := w.askOnStream(h)
		res, _ := c.ask(t, "GET http://shop.test/v1/ws HTTP/1.1\r\nHost: shop.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+fields+"\r\n")
		if res.StatusCode != 400 || res.Header.Get(decisionHeader) == "" {
			t.Errorf("%s: status %d", name, res.StatusCode)
		}
	}
	w.until("a refusal", denial(ReasonRequest))
	if len(s.seen) > 0 {
		t.Errorf("the site got %d requests", len(s.seen))
	}
}

// TestAnswersToWebSockets are held to the key of the request.
func TestAnswersToWebSockets(t *testing.T) {
	for name, tt := range map[string]struct {
		fields string
		ok     bool
	}{
		"the right proof":     {rightProof, true},
		"in another spelling": {strings.Replace(rightProof, "Sec-WebSocket", "sec-websocket", 1), true},
		"no proof":            {"", false},
		"another proof":       {strings.Replace(rightProof, "s3", "S3", 1), false},
		"two proofs":          {rightProof + rightProof, false},
		"the key":             {"Sec-WebSocket-Accept: dGhlIHNhbXBsZSBub25jZQ==\r\n", false},
		"an empty one":        {"Sec-WebSocket-Accept:\r\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorld(t)
			over := make(chan string, 1)
			s.does(func(rw http.ResponseWriter, _ *http.Request) {
				c, buf, err := rw.(http.Hijacker).Hijack()
				if err != nil {
					s.t.Error(err)
					return
				}
				defer c.Close()
				_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+tt.fields+"\r\nraw")
				b, _ := io.ReadAll(buf)
				over <- string(b)
			})
			w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
			raw := w.open1(billing)
			c := &askConn{raw, raw.br}
			if _, err := io.WriteString(c, wantsWebSocket+"up"); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(c.br, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.ok {
				b := make([]byte, 3)
				if _, err := io.ReadFull(c.br, b); res.StatusCode != 101 || err != nil || string(b) != "raw" {
					t.Fatalf("status %d, %q, %v", res.StatusCode, b, err)
				}
				raw.Close()
				if got := <-over; got != "up" {
					t.Errorf("the site got %q", got)
				}
				return
			}
			if b, _ := io.ReadAll(res.Body); res.StatusCode != 502 || strings.Contains(string(b), "raw") {
				t.Errorf("status %d, %q", res.StatusCode, b)
			}
			if got := <-over; got != "" {
				t.Errorf("the site got %q", got)
			}
			end := w.until("the end", kind(audit.KindEgressClose))
			if end.Reason != string(ReasonReset) || !strings.Contains(end.Detail, "does not answer the key") {
				t.Errorf("recorded %+v", end)
			}
		})
	}
}

// TestWebSocketsAreRecordedFirst are not relayed without.
func TestWebSocketsAreRecordedFirst(t *testing.T) {
	w, s := askWorld(t)
	s.echoes()
	w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
	h := w.streamsOn(billing)
	c := w.askOnStream(h)
	if code := c.upgraded(t); code != 101 {
		t.Fatalf("status %d", code)
	}
	for i, r := range w.audit.Records() {
		if r.Kind == audit.KindEgressOpen && strings.HasPrefix(r.Detail, "websocket to 127.0.0.1:") && r.Decision == audit.Allow && r.Path == "/v1/ws" && r.ID != "" {
			break
		}
		if i == len(w.audit.Records())-1 {
			t.Errorf("it is not recorded: %s", w.lines())
		}
	}
	c.echo(t, "ping")
	w.refusing.Store(true)
	if code := w.askOnStream(h).upgraded(t); code != 503 {
		t.Errorf("status %d while nothing can be recorded", code)
	}
	w.refusing.Store(false)
}

// TestUpgradesThatAreNotMeant go on as other requests do, over what the host speaks.
func TestUpgradesThatAreNotMeant(t *testing.T) {
	w, s := askWorld(t)
	w.use(w.policy(asking, s.spoken("h2, http/1.1")))
	s.does(func(rw http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(rw, r.Proto) })
	if res, body := w.askOnStream(w.streamsOn(billing)).ask(t, wantsWebSocket); res.StatusCode != 200 || body != "HTTP/2.0" {
		t.Errorf("%d over %q", res.StatusCode, body)
	}
}

// TestWebSocketsOverHTTP2 are asked for by extended CONNECT, for which the gateway
// has a key of its own.
func TestWebSocketsOverHTTP2(t *testing.T) {
	for version, status := range map[string]string{"13": "200", "8": "400", "": "400"} {
		s := startSite(t, "shop.test")
		w := newWorld(t, nil)
		startRaw1(s, func(string) string {
			return "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " +
				string(http1.AppendWebSocketProof(nil, []byte("c2FsbHlwb3J0LWgyLXdzIQ=="))) + "\r\n\r\n"
		})
		w.use(w.policy(asking, s.originated("shop.test")+"    upgrade: [websocket]\n"))
		got := callRaw(t, w, w.streamsOn(billing), func(r *rawSite) {
			r.head(1, false, ":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/v1/ws", ":authority", "shop.test", "sec-websocket-version", version)
		})
		if got != status {
			t.Errorf("version %q: status %s", version, got)
		}
	}
}
