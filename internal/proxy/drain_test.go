package proxy

import (
	"errors"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
)

func TestDrainLetsTheCallInFlightFinish(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok/slow" {
			close(entered)
			<-leave
		}
		hello(w, r)
	}))
	idle, out, in := r.dialIn(r.web), r.dial(), r.dialIn(r.web)
	for _, w := range []*wire{idle, in} {
		w.say(okRequest)
		w.answer("GET")
	}
	in.say("GET /ok/slow HTTP/1.1\r\nHost: b\r\n\r\n")
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- r.stopIn() }()
	if rest := idle.ended(); rest != "" {
		t.Errorf("an idle connection got %q", rest)
	}
	await(t, func() bool { c, err := net.Dial("tcp", r.inAddr); closeIf(c); return err != nil })
	select {
	case err := <-stopped:
		t.Fatalf("Run ended before the call: %v", err)
	default:
	}
	out.say(proxied)
	if resp, _ := out.answer("GET"); resp.StatusCode != 503 {
		t.Errorf("a new call while draining got %d", resp.StatusCode)
	}
	close(leave)
	if resp, body := in.answer("GET"); resp.StatusCode != 200 || body != "hello /ok/slow" {
		t.Errorf("the call in flight got %d %q", resp.StatusCode, body)
	}
	if rest := in.ended(); rest != "" {
		t.Errorf("then came %q", rest)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func closeIf(c net.Conn) {
	if c != nil {
		c.Close()
	}
}

// When the time is over, a call whose application does not answer is cut, and
// Run returns at once.
func TestDrainEndsInTime(t *testing.T) {
	entered, leave := make(chan struct{}, 2), make(chan struct{})
	r := newRig(t, app(t, func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}), func(r *rig) { r.inCfg.DrainTimeout, r.outCfg.DrainTimeout = time.Millisecond, time.Millisecond })
	defer close(leave)
	in, out := r.dialIn(r.web), r.dial()
	in.say(okRequest)
	out.say(proxied)
	<-entered
	<-entered
	for _, stop := range []func() error{r.stopOut, r.stopIn} {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	if rest := in.ended() + out.ended(); strings.Contains(rest, " 200 ") {
		t.Errorf("got %q", rest)
	}
}

func TestEveryGoroutineEndsWithRun(t *testing.T) {
	before := runtime.NumGoroutine()
	r := newRig(t, app(t, hello))
	client := r.client()
	get(t, client, "http://billing.mesh.internal/ok/1")
	half, err := net.Dial("tcp", r.inAddr) // a handshake that never comes
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	r.dial().say("GET http://billing") // a head that never ends
	for _, stop := range []func() error{r.stopOut, r.stopIn} {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	if n := len(conns(&r.inbound.listener)); n != 0 {
		t.Errorf("%d connections are open", n)
	}
	client.CloseIdleConnections()
	r.inCfg.App.Close()
	// What is left belongs to the test's own server: its accept loop and the
	// connection that it notices last.
	await(t, func() bool { return runtime.NumGoroutine() <= before+2 })
}

func TestAcceptSurvivesTroubleAndEndsWithItsListener(t *testing.T) {
	l := &listener{Shared: Shared{Log: quiet, Audit: audit.NewMemory()}.withDefaults()}
	l.open = map[*conn]struct{}{}
	ln := &troubled{errs: []error{errors.New("too many open files"), errors.New("again"), net.ErrClosed}}
	if err := l.accept(t.Context(), ln, func(*conn) {}); !errors.Is(err, net.ErrClosed) || len(ln.errs) != 0 {
		t.Errorf("got %v, %d errors left", err, len(ln.errs))
	}
}

type troubled struct {
	net.Listener
	errs []error
}

func (t *troubled) Accept() (net.Conn, error) {
	err := t.errs[0]
	t.errs = t.errs[1:]
	return nil, err
}
