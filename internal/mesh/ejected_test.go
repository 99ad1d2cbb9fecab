package mesh

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestEjectionsAreToldTogether(t *testing.T) {
	at := func(hour, minute int) time.Time { return time.Date(2026, 11, 27, hour, minute, 0, 0, time.UTC) }
	addr := netip.MustParseAddrPort("10.0.0.7:8443")
	proxy := func(name string, es ...Ejection) Proxy {
		return Proxy{Workload: spiffeid.RequireFromString("spiffe://corp.example/" + name), Kind: "sidecar", Connected: true, Traffic: &Traffic{Ejections: es}}
	}
	gone, gateway, silent := proxy("gone", Ejection{Service: "a", Kind: "open"}), proxy("gw", Ejection{Service: "host:a.example", Kind: "open", Since: at(11, 1), Why: "3 consecutive failures"}), proxy("old")
	gone.Connected, gateway.Kind, silent.Traffic = false, "gateway", nil
	list := SumEjections([]Proxy{
		proxy("a", Ejection{Service: "billing", Address: addr, Kind: "ejected", Since: at(12, 5), Why: "5 consecutive failures"}),
		proxy("b", Ejection{Service: "billing", Address: addr, Kind: "ejected", Since: at(12, 3), Why: "5 consecutive connect errors"}),
		proxy("c", Ejection{Service: "ledger", Kind: "open", Since: at(11, 0), Why: "7 consecutive failures"},
			Ejection{Service: "billing", Address: addr, Kind: "unhealthy", Since: at(12, 4), Why: "status 500"}),
		proxy("liar", Ejection{Service: "host:a.example", Kind: "open", Since: at(10, 0), Why: "says a sidecar"},
			Ejection{Service: "ledger", Kind: "open", Since: at(11, 2), Why: "once"}, Ejection{Service: "ledger", Kind: "open", Since: at(11, 3), Why: "twice"}),
		gone, gateway, silent,
	})
	var got []string
	for _, e := range list {
		got = append(got, e.String())
	}
	want := `billing: 2 of 5 sidecars eject 10.0.0.7:8443 since 12:03: 5 consecutive connect errors
billing: 1 of 5 sidecars find 10.0.0.7:8443 unhealthy since 12:04: status 500
host:a.example: 1 of 1 gateways have cut it off since 11:01: 3 consecutive failures
ledger: 2 of 5 sidecars have cut it off since 11:00: 7 consecutive failures`
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
}
