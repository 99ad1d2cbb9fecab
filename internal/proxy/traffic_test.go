package proxy

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

func TestAppThatIsDown(t *testing.T) {
	r := newRig(t, "127.0.0.1:1")
	w := r.dialIn(r.web)
	for range 2 {
		w.say(okRequest)
		resp, body := w.answer("GET")
		if resp.StatusCode != 503 || !has(body, "application does not accept") || resp.Header.Get("Sallyport-Decision") != "" {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	}
	if d := decisions(r.inAudit); len(d) != 2 || d[0].Decision != "allow" {
		t.Errorf("records %+v", d)
	}
}

func TestServiceThatIsDown(t *testing.T) {
	r := newRig(t, "127.0.0.1:1")
	if err := r.stopIn(); err != nil {
		t.Fatal(err)
	}
	resp, body := get(t, r.client(), "http://billing.mesh.internal/ok/1")
	if resp.StatusCode != 503 || !has(body, "cannot be reached") {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

// At the address of the service another identity answers: nothing is sent.
func TestServiceMustProveItsIdentity(t *testing.T) {
	r := newRig(t, app(t, hello))
	if err := r.billing.Set(stateOf(t, r, meshtest.ID("/ns/shop/sa/inventory"))); err != nil {
		t.Fatal(err)
	}
	resp, _ := get(t, r.client(), "http://billing.mesh.internal/ok/1")
	if resp.StatusCode != 503 || len(decisions(r.inAudit)) != 0 {
		t.Errorf("got %d, %d calls judged", resp.StatusCode, len(decisions(r.inAudit)))
	}
}

// A rotated identity is used for the next call, not for the next connection
// that happens to be made.
func TestKeptConnectionsFollowTheIdentity(t *testing.T) {
	r := newRig(t, app(t, hello))
	w := r.dial()
	call := func() {
		w.say(proxied)
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Errorf("got %s", resp.Status)
		}
	}
	call()
	call()
	before := conns(&r.inbound.listener)
	if err := r.web.Set(stateOf(t, r, web)); err != nil {
		t.Fatal(err)
	}
	r.gen.Add(1)
	call()
	await(t, func() bool { now := conns(&r.inbound.listener); return len(now) == 1 && !now[only(before)] })
}

func conns(l *listener) map[*conn]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[*conn]bool{}
	for c := range l.open {
		if c.on == nil { // not a stream
			out[c] = true
		}
	}
	return out
}

func only[K comparable](m map[K]bool) (k K) {
	for k = range m {
	}
	return k
}

// dyingApp answers one request on each connection and closes when the next one
// has come in whole, or in part.
func dyingApp(t *testing.T, seen *atomic.Int32) string {
	return rawApp(t, func(c net.Conn, br *bufioReader) {
		for n := 0; skipHead(br) == nil; n++ {
			if seen.Add(1) == 2 {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
}

func TestStaleConnectionIsReplacedForGET(t *testing.T) {
	var seen atomic.Int32
	r := newRig(t, dyingApp(t, &seen))
	w := r.dialIn(r.web)
	for range 3 {
		w.say(okRequest)
		if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "ok" {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	}
	if n := seen.Load(); n != 4 {
		t.Errorf("the application saw %d requests, want 4", n)
	}
	if n := len(decisions(r.inAudit)); n != 3 {
		t.Errorf("%d decisions for 3 calls", n)
	}
}

func TestPOSTIsNeverSentTwice(t *testing.T) {
	var seen atomic.Int32
	r := newRig(t, dyingApp(t, &seen))
	w := r.dialIn(r.web)
	const post = "POST /ok/1 HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\n\r\n"
	for _, want := range []int{200, 502, 200} {
		w.say(post)
		if resp, body := w.answer("POST"); resp.StatusCode != want {
			t.Errorf("got %d %s, want %d", resp.StatusCode, body, want)
		}
	}
	if n := seen.Load(); n != 3 {
		t.Errorf("the application saw %d requests, want 3", n)
	}
}

func TestGETIsTriedTwiceAtMost(t *testing.T) {
	var seen atomic.Int32
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		for skipHead(br) == nil {
			if seen.Add(1) > 1 {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	}))
	w := r.dialIn(r.web)
	for _, want := range []int{200, 502, 502} {
		w.say(okRequest)
		if resp, _ := w.answer("GET"); resp.StatusCode != want {
			t.Errorf("got %d, want %d", resp.StatusCode, want)
		}
	}
	if n := seen.Load(); n != 4 {
		t.Errorf("the application saw %d requests, want 1, 2 and, on no kept connection, 1", n)
	}
}

// An answer that breaks off must not look like a whole one.
func TestBrokenAnswerIsSeenAsBroken(t *testing.T) {
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		if skipHead(br) == nil {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
		}
	}))
	for _, request := range []string{okRequest, "GET /ok/1 HTTP/1.0\r\nHost: b\r\n\r\n"} {
		w := r.dialIn(r.web)
		w.say(request)
		b, err := io.ReadAll(w.r)
		if err == nil {
			t.Errorf("%q ended in order", b)
		}
	}
	w := r.dial()
	w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.0\r\nHost: billing.mesh.internal\r\n\r\n")
	if b, err := io.ReadAll(w.r); err == nil {
		t.Errorf("%q ended in order", b)
	}
}

func TestBodiesPassUnchanged(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		w.Header().Set("X-Up", fmt.Sprintf("%d %x", n, h.Sum(nil)))
		size := int(r.ContentLength)
		if r.URL.Path == "/ok/length" {
			w.Header().Set("Content-Length", fmt.Sprint(len(noise(size, 2))))
		}
		_, _ = w.Write(noise(size, 2))
	}))
	client := r.client()
	for _, size := range []int{0, 1, 1000, 16 << 10, 1<<20 + 7, 20 << 20} {
		for _, path := range []string{"/ok/length", "/ok/chunked"} {
			up := noise(size, 1)
			resp, err := client.Post("http://billing.mesh.internal"+path, "application/octet-stream", bytes.NewReader(up))
			if err != nil {
				t.Fatal(err)
			}
			down, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%d %x", size, sha256.Sum256(up)); resp.Header.Get("X-Up") != want {
				t.Errorf("%d bytes %s: up %s, want %s", size, path, resp.Header.Get("X-Up"), want)
			}
			if !bytes.Equal(down, noise(size, 2)) {
				t.Errorf("%d bytes %s: down %d bytes differ", size, path, len(down))
			}
		}
	}
}

func TestUploadOfUnknownLength(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, _ := io.Copy(h, r.Body)
		fmt.Fprintf(w, "%d %x", n, h.Sum(nil))
	}))
	up := noise(3<<20, 1)
	resp, err := r.client().Post("http://billing.mesh.internal/ok/1", "", io.MultiReader(bytes.NewReader(up)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if want := fmt.Sprintf("%d %x", len(up), sha256.Sum256(up)); string(b) != want {
		t.Errorf("got %s, want %s", b, want)
	}
}

func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	s := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = s.Read(b)
	return b
}

func TestHundredClientsAtOnce(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.URL.Path, b)
	}))
	client := r.client()
	var wg sync.WaitGroup
	const clients, calls = 100, 10
	for i := range clients {
		wg.Go(func() {
			for j := range calls {
				path := fmt.Sprintf("/ok/%d/%d", i, j)
				body := strings.Repeat(path, 1+i*j)
				if j == 5 {
					path = "/secret"
				}
				resp, err := client.Post("http://billing.mesh.internal"+path, "", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				switch {
				case err != nil:
					t.Error(err)
				case j == 5 && resp.StatusCode != 403, j != 5 && string(got) != path+" "+body:
					t.Errorf("%s: got %d %.60s", path, resp.StatusCode, got)
				}
			}
		})
	}
	wg.Wait()
	if n := len(decisions(r.inAudit)); n != clients*calls {
		t.Errorf("%d decisions for %d calls", n, clients*calls)
	}
	await(t, func() bool { return r.inbound.inFlight.Load() == 0 })
}

// A port of one service carries whatever is asked to that service.
func TestPortOfOneService(t *testing.T) {
	r := newRig(t, app(t, echoHead))
	addr, _ := start(t, newDoor(r.outbound, "billing").run)
	for _, request := range []string{
		"GET /ok/1 HTTP/1.1\r\nHost: 127.0.0.1:9001\r\n\r\n",
		"GET http://inventory.mesh.internal/ok/1 HTTP/1.1\r\nHost: inventory.mesh.internal\r\n\r\n",
	} {
		w := newWire(t, addr, nil)
		w.say(request)
		if resp, body := w.answer("GET"); resp.StatusCode != 200 || !has(body, "host=billing.mesh.internal\n") {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	}
	w := newWire(t, addr, nil)
	w.say("CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n")
	if resp, _ := w.answer("CONNECT"); resp.StatusCode != 405 {
		t.Errorf("CONNECT got %d", resp.StatusCode)
	}
	gone, _ := start(t, newDoor(r.outbound, "nobody").run)
	w = newWire(t, gone, nil)
	w.say(okRequest)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.outAudit, "no_route")
}

// The service that a name means is looked up anew in each snapshot.
func TestServiceThatIsTakenAway(t *testing.T) {
	r := newRig(t, app(t, hello))
	w := r.dial()
	w.say(proxied)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Fatalf("got %s", resp.Status)
	}
	r.snap.Store(&mesh.Snapshot{})
	w.say(proxied)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.outAudit, "no_route")
}

func TestWebSocketEndToEnd(t *testing.T) {
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		if skipHead(br) != nil {
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst")
		_, _ = io.Copy(c, br)
	}))
	w := r.dial()
	w.say("GET http://billing.mesh.internal/ok/ws HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\nsecond")
	resp, err := http.ReadResponse(w.r, &http.Request{Method: "GET"})
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v, %v", resp, err)
	}
	got := make([]byte, len("firstsecond"))
	if _, err := io.ReadFull(w.r, got); err != nil || string(got) != "firstsecond" {
		t.Fatalf("got %q, %v", got, err)
	}
	big := noise(1<<20, 3)
	go func() {
		_, _ = w.Write(big)
		_ = w.Conn.(*net.TCPConn).CloseWrite()
	}()
	back, err := io.ReadAll(w.r)
	if err != nil || !bytes.Equal(back, big) {
		t.Errorf("%d bytes came back, %v", len(back), err)
	}
	w.Close()
	await(t, func() bool { return r.inbound.inFlight.Load() == 0 })

	denied := r.dial()
	denied.say("GET http://billing.mesh.internal/secret HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if resp, _ := denied.answer("GET"); resp.StatusCode != 403 {
		t.Errorf("an upgrade that nobody allows got %d", resp.StatusCode)
	}
}
