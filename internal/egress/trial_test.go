package egress

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/upstream"
)

// routedWorld is a world in which shop.test is two sites, with a route in which they
// are %[1]s and %[2]s.
func routedWorld(t *testing.T, route string) (*world, [2]*site) {
	t.Helper()
	return routedWorldWith(t, route, nil)
}

func routedWorldWith(t *testing.T, route string, change func(*Config)) (*world, [2]*site) {
	t.Helper()
	s := [2]*site{startSite(t, "shop.test"), startSite(t, "shop.test")}
	w := newWorld(t, change)
	w.use(w.policy(asking, fmt.Sprintf("  - host: shop.test\n    tls: originate\n    private: [127.0.0.1/32]\n    ca: |\n%s%s    route:\n", indent(s[0].ca), indent(s[1].ca))+
		fmt.Sprintf(strings.ReplaceAll(route, "\t", "      "), s[0].addr, s[1].addr)))
	return w, s
}

// fetches makes one request, and is its status, and how many requests each site has
// had by then.
func (w *world) fetches(verb string, s [2]*site) (status int, had [2]int) {
	w.t.Helper()
	res, _ := w.askOn1().ask(w.t, verb+" http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
	return res.StatusCode, [2]int{len(s[0].seen), len(s[1].seen)}
}

// untilEnds waits for so many records that fit: no poll adds to what another counted.
func (w *world) untilEnds(n int, fits func(audit.Record) bool) {
	w.t.Helper()
	w.until(fmt.Sprintf("%d ends", n), func(audit.Record) bool {
		ended := 0
		for _, r := range w.audit.Records() {
			if fits(r) {
				ended++
			}
		}
		return ended >= n
	})
}

func replies(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func cuts(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func hangs(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

const (
	primary = "\tendpoints: [{address: %q, weight: 1}, {address: %q, priority: 1}]\n"
	dead    = "\tendpoints: [{address: \"127.0.0.1:1\", weight: 1}, {address: %[2]q, priority: 1}] # %[1]s\n"
)

func TestRequestsAreTriedWhereThatIsSafe(t *testing.T) {
	for name, tt := range map[string]struct {
		route, verb string
		first       http.HandlerFunc // what the first site does; nil: it serves
		status      int
		had         [2]int
	}{
		"the first priority is well":                     {primary, "POST", nil, 200, [2]int{1, 0}},
		"the first priority is dead":                     {dead, "POST", nil, 200, [2]int{0, 1}},
		"it breaks off a POST":                           {primary + "\tretry: {attempts: 2}\n", "POST", cuts, 502, [2]int{1, 0}},
		"it breaks off a GET":                            {primary + "\tretry: {attempts: 2}\n", "GET", cuts, 200, [2]int{1, 1}},
		"it breaks off a GET, and nothing is retried":    {primary, "GET", cuts, 502, [2]int{1, 0}},
		"it answers 503 to a POST":                       {primary + "\tretry: {attempts: 2}\n", "POST", replies(503), 503, [2]int{1, 0}},
		"it answers 503 to a GET":                        {primary + "\tretry: {attempts: 2}\n", "GET", replies(503), 200, [2]int{1, 1}},
		"it answers 500 to a GET, which is not a code":   {primary + "\tretry: {attempts: 2}\n", "GET", replies(500), 500, [2]int{1, 0}},
		"it answers 500 to a GET, which is a code":       {primary + "\tretry: {attempts: 2, codes: [500]}\n", "GET", replies(500), 200, [2]int{1, 1}},
		"it hangs with a GET":                            {primary + "\tretry: {attempts: 1}\n\ttimeouts: {backend_request: 2s}\n", "GET", hangs, 200, [2]int{1, 1}},
		"it hangs with a POST":                           {primary + "\tretry: {attempts: 1}\n\ttimeouts: {backend_request: 2s}\n", "POST", hangs, 504, [2]int{1, 0}},
		"it hangs, and the time of the request is over":  {primary + "\tretry: {attempts: 1}\n\ttimeouts: {request: 2s}\n", "GET", hangs, 504, [2]int{1, 0}},
		"it hangs, and the time of all tries is over":    {primary + "\tretry: {attempts: 5}\n\ttimeouts: {request: 3s, backend_request: 2s}\n", "POST", hangs, 504, [2]int{1, 0}},
		"there are no attempts":                          {primary + "\tretry: {attempts: 0}\n", "GET", cuts, 502, [2]int{1, 0}},
		"endpoints in their order, of which one is dead": {"\tendpoints: [\"127.0.0.1:1\", %[2]q] # %[1]s\n", "POST", nil, 200, [2]int{0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, s := routedWorld(t, tt.route)
			if tt.first != nil {
				s[0].does(tt.first)
			}
			if status, had := w.fetches(tt.verb, s); status != tt.status || had != tt.had {
				t.Errorf("%d, with %v requests at the sites; want %d, %v", status, had, tt.status, tt.had)
			}
			end := w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose })
			if tt.status == 504 && end.Reason != string(ReasonTimeout) {
				t.Errorf("recorded %+v", end)
			}
		})
	}
}

// TestWeightsShareRequests allows for more than six standard deviations.
func TestWeightsShareRequests(t *testing.T) {
	t.Parallel()
	w, s := routedWorld(t, "\tendpoints: [{address: %q, weight: 3}, {address: %q, weight: 1}]\n")
	h := w.streamsOn(billing)
	const n = 240
	had := [2]int{}
	for range n {
		if res, _ := w.askOnStream(h).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 {
			t.Fatalf("status %d", res.StatusCode)
		}
		for i := range s {
			for len(s[i].seen) > 0 {
				<-s[i].seen
				had[i]++
			}
		}
	}
	if had[0] < n*3/4-45 || had[0] > n*3/4+45 || had[0]+had[1] != n {
		t.Errorf("%v of %d requests", had, n)
	}
	if a, b := s[0].connected(), s[1].connected(); a+b > 20 {
		t.Errorf("%d connections were made", a+b)
	}
}

// TestBreakerOpensAndCloses at a host all of whose answers are failures for a while.
func TestBreakerOpensAndCloses(t *testing.T) {
	t.Parallel()
	told := make(chan upstream.Trouble, 16)
	w, s := routedWorldWith(t, "\tendpoints: [%q] # %q\n\tbreaker: {consecutive: 3, open: 100ms}\n", func(c *Config) {
		c.Troubled = func(x upstream.Trouble) { told <- x }
	})
	s[0].does(replies(500))
	for i := range 3 {
		if status, _ := w.fetches("POST", s); status != 500 {
			t.Fatalf("answer %d is %d", i, status)
		}
	}
	if x := <-told; x.Kind != upstream.Open || x.Service != "host:shop.test" || x.Dst != "host:shop.test" {
		t.Errorf("told %+v", x)
	}
	if list := w.gw.Troubles(); len(list) != 1 || list[0].Kind != upstream.Open {
		t.Errorf("troubles: %+v", list)
	}
	s[0].does(replies(204))
	refused := 0
	for {
		status, had := w.fetches("POST", s)
		if status == 204 {
			if had[0] != 4 {
				t.Errorf("the site has had %d requests", had[0])
			}
			break
		}
		refused++
		if status != 503 || had[0] != 3 {
			t.Fatalf("while it is cut off: %d, %v", status, had)
		}
	}
	if x := <-told; x.Kind != upstream.Closed {
		t.Errorf("told %+v", x)
	}
	if list := w.gw.Troubles(); len(list) != 0 {
		t.Errorf("troubles: %+v", list)
	}
	n := 0
	for _, r := range w.audit.Records() {
		if denial(ReasonBreaker)(r) {
			n++
		}
	}
	if n != refused {
		t.Errorf("%d refusals are recorded, %d were answered", n, refused)
	}
}

// TestAddressesArePutAside that answer with failures, while others are called.
func TestAddressesArePutAside(t *testing.T) {
	t.Parallel()
	w, s := routedWorld(t, "\tendpoints: [{address: %q, weight: 1000}, {address: %q, weight: 1000}]\n\toutlier: {consecutive: 2}\n")
	s[0].does(replies(500))
	for range 40 { // what an answer says is known a moment after it
		if w.fetches("POST", s); len(w.gw.Troubles()) > 0 {
			break
		}
	}
	if len(w.gw.Troubles()) != 1 {
		t.Fatalf("troubles: %+v", w.gw.Troubles())
	}
	before := len(s[0].seen)
	x := w.gw.Troubles()[0]
	if x.Kind != upstream.Ejected || x.Address.String() != s[0].addr || x.Cause != "failures" {
		t.Errorf("troubles: %+v", x)
	}
	for range 10 {
		if status, _ := w.fetches("POST", s); status != 200 {
			t.Errorf("status %d", status)
		}
	}
	if n := len(s[0].seen) - before; n != 0 {
		t.Errorf("%d requests went to what is put aside", n)
	}
}

// TestTunnelsFailOver to the next priority, and rest what did not answer.
func TestTunnelsFailOver(t *testing.T) {
	w := newWorld(t, nil)
	w.use(w.policy(access, fmt.Sprintf(`
  - host: slow.test
    proto: tcp
    private: [127.0.0.1/32]
    route:
      endpoints: [{address: "127.0.0.1:1", weight: 1}, {address: "192.168.7.7:1", priority: 1}, {address: %q, priority: 2}]
      timeouts: {connect: 5s}
`, w.db.addr)))
	both(t, func(t *testing.T, dial dialFunc) {
		tun, ref := dial(w, billing, "slow.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		echoes(t, tun)
		tun.Close()
	})
	rec := w.until("open", func(r audit.Record) bool { return r.Kind == audit.KindEgressOpen && r.Dst == "host:slow.test" })
	if !strings.Contains(rec.Detail, "to "+w.db.addr) || !strings.Contains(rec.Detail, "skipped 192.168.7.7") {
		t.Errorf("recorded %q", rec.Detail)
	}
}

// TestIdleTunnelsEnd as their destination says.
func TestIdleTunnelsEnd(t *testing.T) {
	w := newWorld(t, nil)
	w.use(w.policy(access, fmt.Sprintf("  - host: slow.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q], timeouts: {idle: 20ms}}\n", w.db.addr)))
	tun, ref := dial1(w, billing, "slow.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	defer tun.Close()
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonIdle) {
		t.Errorf("recorded %+v", end)
	}
}

// TestEndpointsByNameAreScreened has an endpoint whose name leads where the host
// itself may not, and one whose name leads where it may.
func TestEndpointsByNameAreScreened(t *testing.T) {
	for name, want := range map[string]int{"metadata.rebind.test": 403, "private.rebind.test": 403, "direct.test": 200, "absent.test": 502} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			_, port, _ := strings.Cut(w.db.addr, ":")
			w.use(w.policy(access, fmt.Sprintf("  - host: slow.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [\"%s:%s\"]}\n", name, port)))
			status := 200
			tun, ref := dial1(w, billing, "slow.test:5432")
			if ref != nil {
				status = ref.status
			} else {
				defer tun.Close()
			}
			if status != want {
				t.Errorf("%d, want %d: %s", status, want, w.lines())
			}
		})
	}
}

// TestKeptConnectionsKeepToTheirEndpoint after the list of them has changed.
func TestKeptConnectionsKeepToTheirEndpoint(t *testing.T) {
	w, s := routedWorld(t, primary)
	h := w.streamsOn(billing)
	get := func() {
		t.Helper()
		if res, _ := w.askOnStream(h).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 {
			t.Fatalf("status %d", res.StatusCode)
		}
	}
	get()
	w.until("the end", kind(audit.KindEgressClose)) // when the connection is kept
	snap := *w.snap.Load()
	snap.Destinations = slices.Clone(snap.Destinations)
	for i := range snap.Destinations {
		if d := &snap.Destinations[i]; d.Host == "shop.test" {
			d.Endpoints = slices.Clone(d.Endpoints[1:])
		}
	}
	w.use(&snap)
	get()
	if a, b := len(s[0].seen), len(s[1].seen); a != 1 || b != 1 {
		t.Errorf("the sites have had %d and %d requests", a, b)
	}
}

// TestRefusedRetriesAreNoDenials has the breaker open between two tries of a request,
// of which the first has delivered it.
func TestRefusedRetriesAreNoDenials(t *testing.T) {
	t.Parallel()
	w, s := routedWorld(t, primary+"\tretry: {attempts: 2}\n\tbreaker: {consecutive: 1}\n")
	s[0].does(replies(503))
	if status, had := w.fetches("GET", s); status != 503 || had != [2]int{1, 0} {
		t.Errorf("%d, %v", status, had)
	}
	end := w.until("the end", kind(audit.KindEgressClose))
	if end.Reason != string(ReasonBreaker) || end.BytesUp != 2 || !strings.Contains(end.Detail, "status 503 to "+s[0].addr) {
		t.Errorf("recorded %+v", end)
	}
	if lines := w.lines(); strings.Contains(lines, "deny") {
		t.Errorf("recorded as denied: %s", lines)
	}
}

// TestSlowCallersSayNothingOfAHost that waits for the rest of a body.
func TestSlowCallersSayNothingOfAHost(t *testing.T) {
	t.Parallel()
	w, _ := routedWorld(t, primary+"\ttimeouts: {request: 3s}\n\tbreaker: {consecutive: 1}\n")
	res, _ := w.askOn1().ask(t, "POST http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 200000\r\n\r\nhi")
	if res.StatusCode != 504 {
		t.Errorf("status %d", res.StatusCode)
	}
	w.until("the end", kind(audit.KindEgressClose))
	if list := w.gw.Troubles(); len(list) != 0 {
		t.Errorf("the host is to blame: %+v", list)
	}
}
