package egress

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/audit"
)

// A parentProxy speaks CONNECT.
type parentProxy struct {
	addr string
	asks chan *http.Request
	// answer is what it says instead of connecting; empty: it connects, and says what
	// the host says first in the same segment.
	answer string
	// broken is given what was answered on, unless it is nil.
	broken chan<- net.Conn
}

func startParent(t *testing.T, answer string) *parentProxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveParent(t, ln, &parentProxy{answer: answer})
}

// serveParent has p, of which the rest is said, speak at ln.
func serveParent(t *testing.T, ln net.Listener, p *parentProxy) *parentProxy {
	t.Helper()
	p.addr, p.asks = ln.Addr().String(), make(chan *http.Request, 16)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return p
}

func (p *parentProxy) serve(c net.Conn) {
	defer c.Close()
	br := bufio.NewReader(c)
	req, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	p.asks <- req
	if p.answer != "" {
		_, _ = io.WriteString(c, p.answer)
		if p.broken != nil {
			p.broken <- c
			_, _ = io.Copy(io.Discard, c)
		}
		return
	}
	up, err := net.Dial("tcp", req.Host)
	if err != nil {
		_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
		return
	}
	defer up.Close()
	_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nProxy-Agent: a test\r\n\r\n")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(up, br)
		_ = up.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(c, up)
	_ = c.(interface{ CloseWrite() error }).CloseWrite()
	<-done
}

// parentWorld has slow.test, which speaks TCP, behind proxies.
func parentWorld(t *testing.T, proxies string) *world {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("gateway:let-me-out\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *Config) {
		c.Secrets = NewSecrets(map[string]SecretSource{"parent": {File: key}, "absent": {File: key + ".absent"}})
	})
	w.use(w.policy(access, parentPolicy(w, proxies)))
	return w
}

func parentPolicy(w *world, proxies string) string {
	return fmt.Sprintf("  - host: slow.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q], %s}\n", w.db.addr, proxies)
}

func TestTunnelsGoThroughAProxy(t *testing.T) {
	p := startParent(t, "")
	w := parentWorld(t, fmt.Sprintf(`proxies: ["127.0.0.1:1", {address: %q, credentials: parent}]`, p.addr))
	both(t, func(t *testing.T, dial dialFunc) {
		tun, ref := dial(w, billing, "slow.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v %s", ref, w.lines())
		}
		defer tun.Close()
		echoes(t, tun)
		req := <-p.asks
		if user, password, ok := basicOf(req); req.Host != w.db.addr || !ok || user != "gateway" || password != "let-me-out" {
			t.Errorf("asked for %s by %s %s", req.Host, user, password)
		}
	})
	rec := w.until("open", kind(audit.KindEgressOpen))
	if !strings.Contains(rec.Detail, "to "+w.db.addr+" through "+p.addr) {
		t.Errorf("recorded %q", rec.Detail)
	}
	if strings.Contains(w.lines(), "let-me-out") {
		t.Error("a record has the password")
	}
}

func basicOf(req *http.Request) (user, password string, ok bool) {
	r := &http.Request{Header: http.Header{"Authorization": req.Header["Proxy-Authorization"]}}
	return r.BasicAuth()
}

// TestProxiesThatMakeNoConnection are answered for, and nothing reaches the host.
func TestProxiesThatMakeNoConnection(t *testing.T) {
	for name, tt := range map[string]struct {
		answer, proxies string
		status          int
		reason          Reason
		asked           int
	}{
		"it forbids":            {"HTTP/1.1 403 Forbidden\r\n\r\n", `proxies: [%q]`, 502, ReasonDial, 1},
		"it asks who we are":    {"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Basic\r\n\r\n", `proxies: [%q]`, 502, ReasonDial, 1},
		"it cannot connect":     {"HTTP/1.1 502 Bad Gateway\r\n\r\n", `proxies: [%q]`, 502, ReasonDial, 1},
		"it speaks no HTTP":     {"220 mail.test ESMTP\r\n\r\n", `proxies: [%q]`, 502, ReasonDial, 1},
		"it has no end":         {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswer), `proxies: [%q]`, 502, ReasonDial, 1},
		"it hangs up":           {"HTTP/1.1 200", `proxies: [%q]`, 502, ReasonDial, 1},
		"its secret is missing": {"HTTP/1.1 200 OK\r\n\r\n", `proxies: [{address: %q, credentials: absent}]`, 503, ReasonSecret, 0},
		"nobody has its secret": {"HTTP/1.1 200 OK\r\n\r\n", `proxies: [{address: %q, credentials: unheard}]`, 503, ReasonSecret, 0},
		"it is private":         {"HTTP/1.1 200 OK\r\n\r\n", `proxies: ["10.9.9.9:3128"] # %q`, 403, ReasonPrivate, 0},
		"its name is rebound":   {"HTTP/1.1 200 OK\r\n\r\n", `proxies: ["metadata.rebind.test:80"] # %q`, 403, ReasonMetadata, 0},
		"its name is unknown":   {"HTTP/1.1 200 OK\r\n\r\n", `proxies: ["absent.test:80"] # %q`, 502, ReasonResolve, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := startParent(t, tt.answer)
			proxies, _, _ := strings.Cut(fmt.Sprintf(tt.proxies, p.addr), " #")
			w := parentWorld(t, proxies)
			_, ref := dial1(w, billing, "slow.test:5432")
			if ref == nil || ref.status != tt.status || ref.id == "" || len(p.asks) != tt.asked {
				t.Errorf("%+v, %d questions to the proxy%s", ref, len(p.asks), w.lines())
			}
			w.until("the refusal", denial(tt.reason))
			if strings.Contains(w.lines(), "mail.test") {
				t.Errorf("recorded what the proxy says: %s", w.lines())
			}
		})
	}
}

// TestRejudgeFollowsTheProxies that a tunnel goes through.
func TestRejudgeFollowsTheProxies(t *testing.T) {
	p, other := startParent(t, ""), startParent(t, "")
	through := fmt.Sprintf("proxies: [%q]", p.addr)
	for name, tt := range map[string]struct {
		before, after string
		ends          bool
	}{
		"another comes":        {through, fmt.Sprintf("proxies: [%q, %q]", other.addr, p.addr), false},
		"it goes":              {through, fmt.Sprintf("proxies: [%q]", other.addr), true},
		"there is none":        {through, "timeouts: {idle: 1m}", true},
		"there was none":       {"timeouts: {idle: 1m}", through, true},
		"it is asked by other": {through, fmt.Sprintf("proxies: [{address: %q, credentials: parent}]", p.addr), true},
	} {
		t.Run(name, func(t *testing.T) {
			w := parentWorld(t, tt.before)
			tun, ref := dial1(w, billing, "slow.test:5432")
			if ref != nil {
				t.Fatalf("refused: %+v", ref)
			}
			defer tun.Close()
			w.use(w.policy(access, parentPolicy(w, tt.after)))
			w.gw.Rejudge()
			if !tt.ends {
				echoes(t, tun)
				return
			}
			if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonRevoked) {
				t.Errorf("recorded %+v", end)
			}
		})
	}
}

// TestRequestsGoThroughAProxy, over connections that are used again.
func TestRequestsGoThroughAProxy(t *testing.T) {
	p := startParent(t, "")
	w, s := routedWorld(t, "\tendpoints: [%q] # %q\n\tproxies: ["+p.addr+"]\n")
	h := w.streamsOn(billing)
	for n := range 3 {
		if res, body := w.askOnStream(h).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || body != "served" {
			t.Fatalf("%d %q", res.StatusCode, body)
		}
		w.untilEnds(n+1, kind(audit.KindEgressClose)) // when the connection is kept
	}
	if len(s[0].seen) != 3 || len(p.asks) != 1 {
		t.Errorf("the site has had %d requests, the proxy %d", len(s[0].seen), len(p.asks))
	}
}

func FuzzConnected(f *testing.F) {
	for _, s := range []string{"HTTP/1.1 200 OK\r\n\r\nmore", "HTTP/1.0 200\r\nA: b\r\n\r\n", "HTTP/1.1 2x0 OK\r\n\r\n", "HTTP/1.1 200 OK\n\n", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r := strings.NewReader(text)
		status, err := connected(r)
		if (err == nil) != (status >= 200 && status <= 599) {
			t.Errorf("%d, %v", status, err)
		}
		read := text[:len(text)-r.Len()]
		if err == nil && (strings.Index(text, "\r\n\r\n")+4 != len(read) || !strings.HasPrefix(read, "HTTP/1.")) {
			t.Errorf("took %q for a head", read)
		}
	})
}
