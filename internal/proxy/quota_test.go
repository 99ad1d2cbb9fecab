package proxy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/route"
)

func quotaOf(l mesh.RateLimit) *quota {
	return newQuota("billing", &route.Route{Route: &mesh.Route{Name: "all", Limit: &l}}, time.Unix(0, 0))
}

// passed is how many of n calls a second pass in some seconds.
func (q *quota) passed(n int, from, seconds int64) (ok int) {
	for i := range int64(n) * seconds {
		if q.take(&q.count, from*1e9+i*1e9/int64(n)) <= 0 {
			ok++
		}
	}
	return ok
}

func TestAQuotaLetsItsRatePass(t *testing.T) {
	for _, tt := range []struct {
		limit mesh.RateLimit
		calls int
		want  int // in 10 s
	}{
		{mesh.RateLimit{Rate: 10}, 100, 110}, {mesh.RateLimit{Rate: 10, Burst: 1}, 100, 100}, {mesh.RateLimit{Rate: 10, Burst: 50}, 100, 149},
		{mesh.RateLimit{Rate: 10}, 5, 50}, {mesh.RateLimit{Rate: 1000, Burst: 10}, 2000, 10_009},
	} {
		if got := quotaOf(tt.limit).passed(tt.calls, 1000, 10); got < tt.want-1 || got > tt.want+1 {
			t.Errorf("%+v of %d calls a second: %d pass, want %d", tt.limit, tt.calls, got, tt.want)
		}
	}
	q := quotaOf(mesh.RateLimit{Rate: 10, Burst: 1})
	if wait := q.take(&q.count, 5e9); wait != 0 {
		t.Errorf("the first call waits %s", wait)
	}
	if wait := q.take(&q.count, 5e9); wait != 100*time.Millisecond {
		t.Errorf("the second waits %s", wait)
	}
	if n := testing.AllocsPerRun(100, func() { q.take(&q.count, 6e9) }); n != 0 {
		t.Errorf("%.0f allocations", n)
	}
}

func TestWhatCallersAreToldOfALimit(t *testing.T) {
	q := quotaOf(mesh.RateLimit{Rate: 10, Burst: 30})
	for _, tt := range []struct {
		calls int
		at    int64
		want  string
	}{
		{1, 100e9, "r=10;t=1"}, {24, 100e9, "r=5;t=3"}, {5, 100e9, "r=0;t=3"}, {1, 100e9, "r=0;t=3"}, {0, 101e9, "r=10;t=2"}, {0, 200e9, "r=10;t=0"},
	} {
		for range tt.calls {
			q.take(&q.count, tt.at)
		}
		left, full := q.count.left(tt.at, time.Duration(q.step.Load()), time.Duration(q.slack.Load()))
		want := "RateLimit-Policy: \"billing/all\";q=10;w=1\r\nRateLimit: \"billing/all\";" + tt.want + "\r\n"
		if got := string(q.told.append(nil, left, full)); got != want {
			t.Errorf("%d calls, at %d: %q, want %q", tt.calls, tt.at, got, want)
		}
	}
}

// However calls are spread over proxies, and however that changes, all together
// let the rate pass; what is told is a second late.
func TestProxiesShareAQuota(t *testing.T) {
	const rate, proxies, seconds = 100, 4, 30
	for _, spread := range []string{"evenly", "one alone", "in turn"} {
		var qs []*quota
		for range proxies {
			qs = append(qs, quotaOf(mesh.RateLimit{Rate: rate, Burst: 10, Shared: true}))
		}
		passed, offered := 0, 0
		for s := range int64(seconds) {
			for i, q := range qs {
				n := 0
				switch spread {
				case "evenly":
					n = 50
				case "one alone":
					n = 200 * max(1-i, 0)
				case "in turn":
					if s%proxies == int64(i) {
						n = 200
					}
				}
				offered += n
				passed += q.passed(n, 1000+s, 1)
			}
			total := mesh.Total{Proxies: proxies, Issuers: 1}
			var own []uint32
			for _, q := range qs {
				own = append(own, q.demand(time.Unix(s+1, 0)))
				total.Calls += uint64(own[len(own)-1])
			}
			for i, q := range qs {
				q.set(total.Part(rate, own[i]))
			}
		}
		most := rate*seconds + 10*proxies + proxies*rate/10
		t.Logf("%s: %d of %d pass, the rate is %d", spread, passed, offered, rate*seconds)
		if passed > most || spread != "in turn" && passed < rate*(seconds-2) {
			t.Errorf("%s: %d calls pass, want %d to %d", spread, passed, rate*(seconds-2), most)
		}
	}
}

// Who is asked for more than there is says so of all there is.
func TestADemandIsAtMostTheLimit(t *testing.T) {
	q := quotaOf(mesh.RateLimit{Rate: 100, Shared: true})
	q.passed(500, 0, 1)
	if n := q.demand(time.Unix(1, 0)); n != 100 {
		t.Errorf("the demand is %d", n)
	}
}

// What is one too many may come a second later: the calls count only when they
// were made before.
func TestTheLimitOfARoute(t *testing.T) {
	for range 20 {
		took, wrong := callsOverALimit(t)
		if took < 900*time.Millisecond || len(wrong) == 0 {
			for _, what := range wrong {
				t.Error(what)
			}
			return
		}
	}
	t.Error("the calls never came within a second")
}

// callsOverALimit says how long its calls took, and what was wrong with them.
func callsOverALimit(t *testing.T) (took time.Duration, wrong []string) {
	errorf := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	r := routed(t, `routes:
  - name: few
    matches: [{path: {prefix: /ok/few}}]
    limit: {rate: 1, burst: 2}
  - name: rest
`)
	began := time.Now()
	for i, want := range []int{200, 200, 429, 429} {
		resp, body := r.ask("GET", "/ok/few/1")
		if resp.StatusCode != want || (resp.Header.Get("Retry-After") == "1") != (want == 429) {
			errorf("call %d: status %d, Retry-After %q: %s", i, resp.StatusCode, resp.Header.Get("Retry-After"), body)
		}
		got := resp.Header.Get("RateLimit")
		if resp.Header.Get("RateLimit-Policy") != `"billing/few";q=1;w=1` || !strings.HasPrefix(got, `"billing/few";r=`) || want == 429 && got != `"billing/few";r=0;t=1` {
			errorf("call %d: RateLimit-Policy %q, RateLimit %q", i, resp.Header.Get("RateLimit-Policy"), got)
		}
	}
	if resp, _ := r.ask("GET", "/ok/other"); resp.StatusCode != 200 {
		errorf("another route is limited too: %d", resp.StatusCode)
	} else if got := resp.Header.Get("RateLimit"); got != "" {
		errorf("a route without a limit has RateLimit %q", got)
	}
	denied := 0
	for _, d := range decisions(r.outAudit) {
		if d.Reason == "limit" && d.Dst == billing.String() && strings.Contains(d.Detail, "billing/few") {
			denied++
		}
	}
	if n := r.metric(`sallyport_requests_refused_total{reason="limit",reporter="outbound"}`); denied != 2 || n != "2" {
		errorf("%d records, counted %s", denied, n)
	}
	// A policy that leaves the limit as it is does not begin anew.
	r.use(r.access)
	if resp, _ := r.ask("GET", "/ok/few/1"); resp.StatusCode != 429 {
		errorf("after a new policy: %d", resp.StatusCode)
	}
	w := r.dial()
	w.say("POST http://billing.mesh.internal/ok/few/G HTTP/1.1\r\nHost: billing.mesh.internal\r\nTE: trailers\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n")
	if resp, _ := w.answer("POST"); resp.StatusCode != 200 || resp.Header.Get("Grpc-Status") != "8" {
		errorf("a call of gRPC got %d, status %q", resp.StatusCode, resp.Header.Get("Grpc-Status"))
	}
	return time.Since(began), wrong
}

func TestASharedLimitTakesWhatItIsTold(t *testing.T) {
	r := routed(t, "routes: [{name: all, limit: {rate: 100, burst: 20, shared: true}}]\n")
	count := func() (n int) {
		for range 40 {
			if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode == 200 {
				n++
			}
		}
		return n
	}
	r.ask("GET", "/ok/1")
	d := r.outbound.Demands()
	if len(d) != 1 || d[0].Route != "billing/all" || d[0].PerCaller {
		t.Fatalf("asked for %+v", d)
	}
	q := r.outbound.quotas.of["billing/all"]
	if got := time.Duration(q.step.Load()); got != 100*time.Millisecond {
		t.Errorf("before it is told, a call each %s", got)
	}
	r.outbound.Share([]mesh.Total{{Quota: mesh.Quota{Route: "billing/none"}, Proxies: 1}, {Quota: mesh.Quota{Route: "billing/all", PerCaller: true}, Proxies: 1}})
	if got := time.Duration(q.step.Load()); got != 100*time.Millisecond {
		t.Errorf("told of others, a call each %s", got)
	}
	r.outbound.Share([]mesh.Total{{Quota: d[0].Quota, Calls: 1000, Proxies: 1000, Issuers: 1}})
	if got := q.step.Load(); got < int64(time.Second) {
		t.Errorf("beside a thousand others, a call each %s", time.Duration(got))
	}
	began := time.Now()
	if n := count(); n > 3+int(time.Since(began).Seconds()) {
		t.Errorf("%d calls pass", n)
	}
}
