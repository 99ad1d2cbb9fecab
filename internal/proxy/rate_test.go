package proxy

import (
	"fmt"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

func perHour(n, burst int) mesh.CallRate {
	return mesh.CallRate{Path: "/ok/few/**", Rate: mesh.Rate{Calls: n, Per: time.Hour}, Burst: burst}
}

// Each caller has a count of its own, for the calls that a rate speaks of. One
// too many is a recorded refusal and never reaches judge or application.
func TestRateOfEachCaller(t *testing.T) {
	batch := meshtest.ID("/ns/shop/sa/batch")
	r := newRig(t, app(t, hello), func(r *rig) {
		r.inCfg.Rates = []mesh.CallRate{perHour(60, 2)}
		r.access += "p, too, in, " + batch.String() + ", " + billing.String() + ", 8443, *, /ok/**, -, allow\n"
	})
	call := func(w *wire, path string) (status, after int, body string) {
		t.Helper()
		w.say("GET " + path + " HTTP/1.1\r\nHost: b\r\n\r\n")
		resp, body := w.answer("GET")
		if text := resp.Header.Get("Retry-After"); text != "" {
			var err error
			if after, err = strconv.Atoi(text); err != nil {
				t.Errorf("Retry-After: %v", err)
			}
		}
		return resp.StatusCode, after, body
	}
	for _, w := range []*wire{r.dialIn(r.web), r.dialIn(meshtest.Source(t, r.ca, batch))} {
		for i := range 4 {
			status, after, body := call(w, "/ok/few/1")
			if want := []int{200, 200, 429, 429}[i]; status != want || want == 200 && after != 0 || want == 429 && (after < 30 || after > 60) {
				t.Errorf("call %d got %d, Retry-After %d: %s", i, status, after, body)
			}
			if status == 429 && !has(body, `"too many calls"`, `"decision"`) {
				t.Errorf("it was told %s", body)
			}
		}
		if status, _, _ := call(w, "/ok/many"); status != 200 {
			t.Errorf("another path got %d", status)
		}
	}
	// A new connection of the same caller has the same count.
	if status, _, _ := call(r.dialIn(r.web), "/ok/few/2"); status != 429 {
		t.Errorf("on a new connection: %d", status)
	}
	denied := 0
	for _, d := range decisions(r.inAudit) {
		if d.Reason == "rate" {
			denied++
		}
	}
	if n := r.metric(`sallyport_requests_refused_total{reason="rate",reporter="inbound"}`); denied != 5 || n != "5" {
		t.Errorf("%d records, counted %s", denied, n)
	}
}

func TestRateComesBackWithTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, err := newRates([]mesh.CallRate{{Rate: mesh.Rate{Calls: 10, Per: time.Second}, Burst: 3}})
		if err != nil {
			t.Fatal(err)
		}
		b := all.bounds(web)[0]
		passed := 0
		for range 100 { // ten seconds, a call each 100 ms, and two more each time
			for range 3 {
				if b.take(time.Now().UnixNano()) == 0 {
					passed++
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		if passed != 102 {
			t.Errorf("%d calls passed, want 10 a second and a burst", passed)
		}
		if wait := b.take(time.Now().UnixNano()); wait != 0 {
			t.Errorf("after a pause it must wait %s", wait)
		}
		time.Sleep(time.Hour)
		for i := range 5 {
			if wait := b.take(time.Now().UnixNano()); (wait == 0) != (i < 3) || wait > 100*time.Millisecond {
				t.Errorf("call %d after an hour waits %s", i, wait)
			}
		}
	})
}

// A flood of identities shares a count rather than the memory of the proxy.
func TestRateForgetsWhoIsQuiet(t *testing.T) {
	all, err := newRates([]mesh.CallRate{perHour(1, 1)})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UnixNano()
	for i := range mostCounts {
		all.bounds(meshtest.ID(fmt.Sprintf("/ns/shop/sa/w%d", i)))[0].take(now)
	}
	late := []spiffeid.ID{meshtest.ID("/late"), meshtest.ID("/later")}
	if all.bounds(late[0])[0].take(now) != 0 || all.bounds(late[1])[0].take(now) == 0 {
		t.Error("those beyond the bound do not share one count")
	}
	for _, c := range all[0].callers.of {
		c.free.Store(now - 1)
	}
	all.bounds(late[0])
	if n := len(all[0].callers.of); n != 1 {
		t.Errorf("%d are remembered", n)
	}
}

// A rate that nobody could mean is refused before a listener opens.
func TestRateThatIsNone(t *testing.T) {
	r := newParts(t, "127.0.0.1:1")
	r.inCfg.Rates = []mesh.CallRate{{Path: "x"}}
	if _, err := NewInbound(r.inCfg); err == nil || !has(err.Error(), "rates[0]: path: ", "rate: missing") {
		t.Errorf("got %v", err)
	}
}

func BenchmarkRateLimit(b *testing.B) {
	all, err := newRates([]mesh.CallRate{{Path: "/v1/**", Rate: mesh.Rate{Calls: 1 << 30, Per: time.Second}}})
	if err != nil {
		b.Fatal(err)
	}
	x := &call{bounds: all.bounds(web), start: time.Now()}
	x.req.Method, x.req.Path = []byte("GET"), []byte("/v1/x")
	in := &Inbound{}
	b.ReportAllocs()
	for b.Loop() {
		x.start = x.start.Add(time.Second)
		if in.rateLimit(x) != nil {
			b.Fatal("refused")
		}
	}
}
