package main

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

func TestDistribution(t *testing.T) {
	proxy := func(name string, state mesh.ProxyState, revision uint64, connected bool) mesh.Proxy {
		p := mesh.Proxy{Workload: spiffeid.RequireFromString("spiffe://corp.example/" + name), State: state, PolicyRevision: revision, Connected: connected}
		if state == mesh.Rejected {
			p.Reason = "access.csv:3: unknown verb"
		}
		return p
	}
	ok := proxy("a", mesh.Synced, 7, true)
	rolling := func(state mesh.RolloutState, bake time.Duration) mesh.IssuerStatus {
		return mesh.IssuerStatus{PolicyRevision: 7, Rollout: &mesh.Rollout{Revision: 8, State: state, Bake: bake, Why: "no"}}
	}
	for _, tt := range []struct {
		name    string
		st      mesh.IssuerStatus
		ps      []mesh.Proxy
		settled bool
		want    string
	}{
		{"all have it", mesh.IssuerStatus{PolicyRevision: 7}, []mesh.Proxy{ok}, true, ""},
		{"nobody is there", mesh.IssuerStatus{PolicyRevision: 7}, nil, true, ""},
		{"one that left does not count", mesh.IssuerStatus{PolicyRevision: 7}, []mesh.Proxy{ok, proxy("b", mesh.Stale, 6, false), proxy("c", mesh.Rejected, 6, false)}, true, ""},
		{"one has not answered", mesh.IssuerStatus{PolicyRevision: 7}, []mesh.Proxy{ok, proxy("b", mesh.Stale, 6, true)}, false, "1 of 2 connected proxies do not act on revision 7 after 1m0s: spiffe://corp.example/b"},
		{"one refuses", mesh.IssuerStatus{PolicyRevision: 7}, []mesh.Proxy{ok, proxy("b", mesh.Rejected, 6, true), proxy("c", mesh.Stale, 6, true)}, true, "1 of 3 connected proxies refuse revision 7: spiffe://corp.example/b keeps revision 6: access.csv:3: unknown verb"},
		{"the issuer refuses", mesh.IssuerStatus{PolicyRevision: 7, LastRefusal: "access.csv:1: no"}, []mesh.Proxy{ok}, true, "the issuer refuses the newest edit, revision 7 stays in force: access.csv:1: no"},
		{"others are tried", rolling(mesh.Baking, time.Minute), []mesh.Proxy{ok}, false, ""},
		{"others are tried, and a proxy refuses", rolling(mesh.Baking, time.Minute), []mesh.Proxy{ok, proxy("b", mesh.Rejected, 7, true)}, false, "refuse revision 8: spiffe://corp.example/b keeps revision 7"},
		{"others are tried until somebody promotes them", rolling(mesh.Baking, 0), []mesh.Proxy{ok}, true, ""},
		{"others were tried, and are in force", rolling(mesh.Promoted, 0), []mesh.Proxy{ok}, true, ""},
		{"others were taken back", rolling(mesh.TakenBack, 0), []mesh.Proxy{ok}, true, "revision 8 is taken back: no"},
		{"others are held", rolling(mesh.Held, time.Minute), []mesh.Proxy{ok, proxy("b", mesh.Rejected, 7, true)}, true, "revision 8 is held: no; its canary proxies stay on it"},
		{"others were overtaken", rolling(mesh.Overtaken, 0), []mesh.Proxy{ok}, true, "revision 8 was overtaken: no"},
		{"there are none", mesh.IssuerStatus{}, nil, true, "no policies are in force"},
	} {
		d := distributed(tt.st, tt.ps)
		if d.Rollout != nil {
			d.tried = d.Rollout.Revision
		}
		if d.settled() != tt.settled {
			t.Errorf("%s: settled is %v", tt.name, d.settled())
		}
		if want := strings.Contains(tt.want, "refuse"); d.refused() != want && !strings.Contains(tt.want, "held") {
			t.Errorf("%s: refused is %v", tt.name, d.refused())
		}
		err := d.failure(time.Minute)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	// A canary that acts on what is in force for others has not acknowledged.
	canary := ok
	canary.Group = mesh.GroupCanary
	if d := distributed(rolling(mesh.Baking, 0), []mesh.Proxy{canary}); d.of(d.Proxies) {
		t.Error("the acknowledgement of revision 7 passes for one of the rollout")
	}
	now := time.Unix(1e9, 0)
	for want, ro := range map[string]mesh.Rollout{
		"canary: revision 8, set abc, baking for 2m of 5m0s; 2 of 3 canary proxies ack (5%), pushed by boss":                     {State: mesh.Baking, Bake: 5 * time.Minute, Started: now.Add(-2 * time.Minute)},
		"canary: revision 8, set abc, baking for 2m, until it is promoted; 2 of 3 canary proxies ack (5%), pushed by boss":       {State: mesh.Baking, Started: now.Add(-2 * time.Minute)},
		"canary: revision 8, set abc, taken back 1m ago; 2 of 3 canary proxies ack (5%), pushed by boss\n  b refuses revision 8": {State: mesh.TakenBack, Ended: now.Add(-time.Minute), Why: "b refuses revision 8"},
	} {
		ro.Revision, ro.Set, ro.Group, ro.By, ro.Members, ro.Acked = 8, "abc", []string{"5%"}, "boss", 3, 2
		if got := rolloutLine(&ro, now); got != want {
			t.Errorf("the rollout is %q, want %q", got, want)
		}
	}
	// An edit came after the proxies were asked.
	if d := distributed(mesh.IssuerStatus{PolicyRevision: 8}, []mesh.Proxy{ok}); d.of(d.Proxies) {
		t.Error("the acknowledgement of revision 7 passes for one of 8")
	}
}
