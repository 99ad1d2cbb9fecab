package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

const okRequest = "GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"

const proxied = "GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"

// denied checks that header, body and audit record tell of one decision.
func denied(t *testing.T, resp *http.Response, body string, log *audit.Log, reason string) audit.Record {
	t.Helper()
	var told struct{ Error, Decision string }
	if err := json.Unmarshal([]byte(body), &told); err != nil {
		t.Fatalf("body %q: %v", body, err)
	}
	id := resp.Header.Get("Sallyport-Decision")
	if resp.StatusCode != 403 || id == "" || told.Decision != id || told.Error != "denied by policy" {
		t.Errorf("got %d, header %q, body %s", resp.StatusCode, id, body)
	}
	all := decisions(log)
	last := all[len(all)-1]
	if last.ID != id || last.Decision != audit.Deny || last.Reason != reason {
		t.Errorf("record is %+v, want %s with reason %s", last, id, reason)
	}
	return last
}

func TestCallIsJudgedAndRecorded(t *testing.T) {
	r := newRig(t, app(t, hello))
	resp, body := get(t, r.client(), "http://billing.mesh.internal/ok/1")
	if resp.StatusCode != 200 || body != "hello /ok/1" {
		t.Fatalf("got %d %q", resp.StatusCode, body)
	}
	if resp.Header.Get("Sallyport-Decision") != "" {
		t.Error("an allowed call has a decision in its answer")
	}
	d := decisions(r.inAudit)
	if len(d) != 1 || d[0].Decision != audit.Allow || d[0].Rule != "all" || d[0].Src != web.String() || d[0].Dst != billing.String() ||
		d[0].Verb != "GET" || d[0].Path != "/ok/1" || d[0].Trace == "" {
		t.Errorf("records %+v", d)
	}
	resp, body = get(t, r.client(), "http://billing.mesh.internal/secret")
	if rec := denied(t, resp, body, r.inAudit, string(authz.NoRow)); rec.Path != "/secret" || rec.Src != web.String() {
		t.Errorf("record %+v", rec)
	}
	if n := len(decisions(r.outAudit)); n != 0 {
		t.Errorf("the way out made %d decisions about a call that it only carries", n)
	}
}

// What only a file denies that is not enforced passes; the caller is told of a
// decision that is in the record, and not by the application.
func TestDenialThatIsNotEnforced(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Sallyport-Warning", "forged")
		hello(w, req)
	}))
	w := r.dialIn(r.web)
	for _, c := range []struct {
		mode   string
		status int
		warns  bool
	}{{"enforce", 403, false}, {"observe", 200, false}, {"warn", 200, true}, {"enforce", 403, false}} {
		r.modes = "access.csv: " + c.mode + "\n"
		r.use(accessCSV)
		w.say("GET /secret HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		resp, body := w.answer("GET")
		all := decisions(r.inAudit)
		last := all[len(all)-1]
		told := resp.Header.Values("Sallyport-Warning")
		if resp.StatusCode != c.status || (len(told) == 1) != c.warns || len(told) > 1 {
			t.Errorf("%s: got %d %s, warning %q", c.mode, resp.StatusCode, body, told)
		}
		if c.warns && !strings.HasSuffix(told[0], "decision="+last.ID) {
			t.Errorf("warning %q, record %+v", told, last)
		}
		if c.status == 200 && (last.Decision != audit.Allow || last.Reason != c.mode || last.Rule != "") {
			t.Errorf("%s: record %+v", c.mode, last)
		}
		w.say(okRequest)
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 || resp.Header.Get("Sallyport-Warning") != "" {
			t.Errorf("%s: an allowed call got %s, %v", c.mode, resp.Status, resp.Header)
		}
	}
}

func TestRefusedCallKeepsTheConnection(t *testing.T) {
	r := newRig(t, app(t, hello))
	w := r.dialIn(r.web)
	for range 3 {
		w.say("POST /secret HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: 5\r\n\r\n12345")
		resp, body := w.answer("POST")
		denied(t, resp, body, r.inAudit, string(authz.NoRow))
		w.say(okRequest)
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Errorf("after a refusal: %s", resp.Status)
		}
	}
}

func TestNewPolicyCountsOnKeptConnections(t *testing.T) {
	r := newRig(t, app(t, hello))
	w, in := r.dial(), r.dialIn(r.web)
	call := func(want int) {
		t.Helper()
		w.say(proxied)
		in.say(okRequest)
		for _, c := range []*wire{w, in} {
			if resp, body := c.answer("GET"); resp.StatusCode != want {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, want)
			}
		}
	}
	call(200)
	r.use("")
	call(403)
	r.use(accessCSV)
	call(200)
	r.use(accessCSV + "p, stop, in, **, spiffe://demo.sallyport/ns/shop/sa/billing, *, *, **, -, deny\n")
	call(403)
}

func TestPortOfTheNewPolicyCounts(t *testing.T) {
	var port atomic.Uint32
	port.Store(8443)
	r := newRig(t, app(t, hello), func(r *rig) { r.inCfg.Port = func() uint16 { return uint16(port.Load()) } })
	w := r.dialIn(r.web)
	for _, c := range []struct{ port, want int }{{8443, 200}, {9000, 403}, {0, 403}, {8443, 200}} {
		port.Store(uint32(c.port))
		w.say(okRequest)
		if resp, _ := w.answer("GET"); resp.StatusCode != c.want {
			t.Errorf("port %d: got %d, want %d", c.port, resp.StatusCode, c.want)
		}
	}
}

func TestNoPolicyDenies(t *testing.T) {
	r := newRig(t, app(t, hello))
	r.judge.Use(nil)
	r.snap.Store(nil)
	w := r.dialIn(r.web)
	w.say(okRequest)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.inAudit, string(authz.NoPolicy))
	resp, body = get(t, r.client(), "http://billing.mesh.internal/ok/1")
	denied(t, resp, body, r.outAudit, "no_policy")
}

// What cannot be recorded does not happen, and is not passed off as a decision.
func TestCallsThatCannotBeRecordedAreRefused(t *testing.T) {
	var reached atomic.Int32
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) { reached.Add(1) }), func(r *rig) {
		full := recorder(func(*audit.Record) error { return errors.New("disk full") })
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: full, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		r.judge, r.inCfg.Judge, r.inCfg.Audit, r.outCfg.Audit = j, j, full, full
	})
	for _, url := range []string{"http://billing.mesh.internal/ok/1", "http://billing.mesh.internal/secret", "http://nowhere.mesh.internal/"} {
		resp, body := get(t, r.client(), url)
		if resp.StatusCode != 503 || resp.Header.Get("Sallyport-Decision") != "" || !has(body, "could not be recorded") {
			t.Errorf("%s: got %d %s %s", url, resp.StatusCode, resp.Header, body)
		}
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("the application got %d calls", n)
	}
}

func TestUnknownServicesAreRefusedAndRecorded(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.Gateways = nil })
	for _, host := range []string{"nobody.mesh.internal", "example.com", "127.0.0.1:8080", "billing.mesh.internal.example.com", "x.billing.mesh.internal"} {
		resp, body := get(t, r.client(), "http://"+host+"/ok/1")
		if rec := denied(t, resp, body, r.outAudit, "no_route"); !strings.HasPrefix(rec.Dst, "host:") || rec.Dir != string(mesh.Out) {
			t.Errorf("%s: record %+v", host, rec)
		}
	}
}

func TestStrangerProcessIsRefused(t *testing.T) {
	r := newRig(t, app(t, hello))
	err := errors.New("pid 7 (/bin/evil, uid 1000) is not the workload")
	r.stranger.Store(&err)
	w := r.dial()
	w.say(proxied)
	resp, body := w.answer("GET")
	rec := denied(t, resp, body, r.outAudit, "not_workload")
	if !resp.Close || rec.Detail != err.Error() || has(body, "evil") {
		t.Errorf("close %v, record %+v, body %s", resp.Close, rec, body)
	}
	if rest := w.ended(); rest != "" {
		t.Errorf("then came %q", rest)
	}
	w = r.dial()
	w.say("CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n")
	resp, body = w.answer("CONNECT")
	denied(t, resp, body, r.outAudit, "not_workload")
}

// A connection can be handed to another process after its first call.
func TestProcessIsAskedForAgain(t *testing.T) {
	r := newRig(t, app(t, hello))
	d := newDoor(r.outbound, "billing")
	d.askEvery = 0
	addr, _ := start(t, d.run)
	w := newWire(t, addr, nil)
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Fatalf("got %s", resp.Status)
	}
	err := errors.New("another process")
	r.stranger.Store(&err)
	w.say(okRequest)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.outAudit, "not_workload")
	if n := r.locals.Load(); n != 2 {
		t.Errorf("asked %d times, want 2", n)
	}
}

// Who is asked for before the answer is old keeps no call waiting, and the answer
// counts for the next one.
func TestProcessIsAskedForAhead(t *testing.T) {
	r := newParts(t, "127.0.0.1:1")
	d := newDoor(r.outbound, "billing")
	d.askEvery = time.Hour
	asked, answer := make(chan struct{}), make(chan error)
	ask := func() error {
		asked <- struct{}{}
		return <-answer
	}
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	now := time.Now()
	x := &call{conn: &conn{Conn: near}, process: &process{ask: ask, asked: now.Add(-50 * time.Minute)}, start: now}
	for range 2 { // the second does not ask once more
		if err := d.strangerOn(x); err != nil {
			t.Errorf("a call meets %v", err)
		}
	}
	<-asked
	another := errors.New("another process")
	answer <- another
	await(t, func() bool { return errors.Is(d.strangerOn(x), another) })
}

func TestAnswerAboutTheProcessHoldsForAWhile(t *testing.T) {
	r := newParts(t, app(t, hello))
	r.inAddr, r.stopIn = start(t, r.inbound.Run)
	d := newDoor(r.outbound, "")
	d.askEvery = time.Hour
	r.outAddr, _ = start(t, d.run)
	r.use(r.access)
	w := r.dial()
	for range 5 {
		w.say(proxied)
		w.answer("GET")
	}
	if n := r.locals.Load(); n != 1 {
		t.Errorf("asked %d times for 5 calls, want once", n)
	}
}

// The calls of a connection of HTTP/2 come from one process, which is asked for
// once for all of them.
func TestProcessIsAskedForOnceForAllLanes(t *testing.T) {
	release := make(chan struct{})
	var waiting atomic.Int32
	r := newParts(t, app(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ok/first" {
			waiting.Add(1)
			<-release
		}
	}))
	r.inAddr, _ = start(t, r.inbound.Run)
	d := newDoor(r.outbound, "")
	d.askEvery = time.Hour
	r.outAddr, _ = start(t, d.run)
	r.use(r.access)
	c := r.clientH2C()
	get(t, c, "http://billing.mesh.internal/ok/first") // makes the connection
	const lanes = 8
	var wg sync.WaitGroup
	for range lanes {
		wg.Go(func() {
			if resp, _ := get(t, c, "http://billing.mesh.internal/ok/1"); resp.StatusCode != 200 {
				t.Errorf("got %s", resp.Status)
			}
		})
	}
	await(t, func() bool { return waiting.Load() == lanes })
	if n := r.locals.Load(); n != 1 {
		t.Errorf("asked %d times for %d calls on one connection", n, lanes+1)
	}
	close(release)
	wg.Wait()
}

func TestExpiredPeerIsRefusedOnAKeptConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newParts(t, "127.0.0.1:1")
		r.inAddr = "10.0.0.1:15006"
		r.use("")
		network := new(meshtest.Network)
		ln, err := network.Listen(r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.inbound.Run(ctx, ln) }()
		short := svid.NewSource()
		if err := short.Set(&svid.State{Identities: []svid.Identity{r.ca.Issue(t, web, 20*time.Second)}, Bundle: r.ca.Bundle()}); err != nil {
			t.Fatal(err)
		}
		c, err := network.DialContext(ctx, "tcp", r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		w := wireOn(t, c, svid.ClientTLS(short, billing, "http/1.1"))
		for _, reason := range []string{string(authz.NoPolicy), string(authz.NoPolicy), "svid_expired"} {
			w.say(okRequest)
			resp, body := w.answer("GET")
			denied(t, resp, body, r.inAudit, reason)
			if resp.Close != (reason == "svid_expired") {
				t.Errorf("%s: close %v", reason, resp.Close)
			}
			time.Sleep(10 * time.Second)
		}
		if rest := w.ended(); rest != "" {
			t.Errorf("the connection goes on: %q", rest)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestProofIsLookedAtAgain(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) {})
	in, err := NewInbound(r.inCfg)
	if err != nil {
		t.Fatal(err)
	}
	in.verifyEvery = 0
	addr, _ := start(t, in.Run)
	w := newWire(t, addr, svid.ClientTLS(r.web, billing, "http/1.1"))
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Fatalf("got %s", resp.Status)
	}
	// The root that the peer was proved by is withdrawn.
	other := meshtest.NewCA(t, meshtest.TD)
	if err := r.billing.Set(&svid.State{Identities: []svid.Identity{other.Issue(t, billing, time.Hour)}, Bundle: other.Bundle()}); err != nil {
		t.Fatal(err)
	}
	w.say(okRequest)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.inAudit, "svid_invalid")
}

func TestNobodyWithoutSVIDGetsIn(t *testing.T) {
	r := newRig(t, app(t, hello))
	foreign := meshtest.NewCA(t, meshtest.TD)
	c, err := net.Dial("tcp", r.inAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, okRequest); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(c)
	if has(string(b), "HTTP") {
		t.Errorf("clear text got %q", b)
	}
	evil := svid.NewSource()
	if err := evil.Set(&svid.State{Identities: []svid.Identity{foreign.Issue(t, web, time.Hour)}, Bundle: r.ca.Bundle()}); err == nil {
		t.Fatal("a source took an identity of another CA")
	}
	if err := evil.Set(&svid.State{Identities: []svid.Identity{foreign.Issue(t, web, time.Hour)}, Bundle: foreign.Bundle()}); err != nil {
		t.Fatal(err)
	}
	if resp := handshakeAndAsk(t, r.inAddr, evil); resp != "" {
		t.Errorf("an identity of another CA got %q", resp)
	}
	if n := len(decisions(r.inAudit)); n != 0 {
		t.Errorf("%d calls were judged", n)
	}
	awaitRecords(t, r.inAudit, audit.KindTLS, 2)
}

// Parameters in a path, once allowed, get around no row and no rate: what is
// judged and recorded is the path without them, what is forwarded the path.
func TestParametersGetAroundNoRow(t *testing.T) {
	const access = `p, all, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /ok/**, -, allow
p, rest, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /rest/**, -, allow
p, admin, in, **, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /ok/admin, -, deny
`
	r := newRig(t, app(t, echoHead), func(r *rig) {
		r.access = access
		r.inCfg.Limits.AllowParams, r.outCfg.Limits.AllowParams = true, true
		r.inCfg.Rates = []mesh.CallRate{{Path: "/rest/once", Rate: mesh.Rate{Calls: 1, Per: time.Hour}}}
	})
	for _, c := range []struct {
		path, judged string
		want         int
	}{
		{"/ok/x;a=b", "/ok/x", 200},
		{"/ok;v=1/x;", "/ok/x", 200},
		{"/ok/admin", "/ok/admin", 403},
		{"/ok/admin;x", "/ok/admin", 403},
		{"/ok/admin;", "/ok/admin", 403},
		{"/ok;x/admin;y=%2e", "/ok/admin", 403},
		{"/ok/%61dmin;x", "/ok/admin", 403},
		{"/other;/ok/x", "/other/ok/x", 403},
		{"/rest/once;a", "/rest/once", 200},
		{"/rest/once;b", "/rest/once", 429},
		{"/rest/once", "/rest/once", 429},
	} {
		w := r.dial()
		w.say("GET " + c.path + " HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		resp, got := w.answer("GET")
		if resp.StatusCode != c.want || c.want == 200 && !has(got, "GET "+strings.Replace(c.path, "%61", "a", 1)+" ") {
			t.Errorf("%s: got %d, want %d\n%s", c.path, resp.StatusCode, c.want, got)
		}
		all := decisions(r.inAudit)
		if d := all[len(all)-1]; d.Path != c.judged {
			t.Errorf("%s: judged as %q, want %q", c.path, d.Path, c.judged)
		}
	}
}
