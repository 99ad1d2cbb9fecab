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
		{"there are none", mesh.IssuerStatus{}, nil, true, "no policies are in force"},
	} {
		d := distributed(tt.st, tt.ps)
		if d.settled() != tt.settled {
			t.Errorf("%s: settled is %v", tt.name, d.settled())
		}
		err := d.failure(time.Minute)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	// An edit came after the proxies were asked.
	if d := distributed(mesh.IssuerStatus{PolicyRevision: 8}, []mesh.Proxy{ok}); d.of(d.Proxies) {
		t.Error("the acknowledgement of revision 7 passes for one of 8")
	}
}
