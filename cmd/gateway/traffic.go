package main

import (
	"encoding/json"
	"net/http"

	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// troubled tells the operator, in the log and the metrics, of an address that is put
// aside and of a host that is cut off or called again.
func (gw *gateway) troubled(t upstream.Trouble) {
	switch t.Kind {
	case upstream.Ejected:
		gw.metrics.Ejections(t.Dst, t.Cause).Inc()
		gw.log.Warn("address put aside", "host", t.Service, "address", t.Address, "until", t.Until, "why", t.Why)
	case upstream.Open:
		gw.metrics.BreakerOpen(t.Dst).Add(1) // a pattern has many hosts
		gw.log.Warn("host cut off", "host", t.Service, "why", t.Why)
	case upstream.Closed:
		gw.metrics.BreakerOpen(t.Dst).Add(-1)
		gw.log.Info("host is called again", "host", t.Service)
	}
}

// maxNamed is how long a name may be that the issuer takes for that of a service,
// bytes.
const maxNamed = 63

// traffic is what the issuer learns of what passes here.
func (gw *gateway) traffic() *mesh.Traffic {
	t := &mesh.Traffic{Demands: gw.egress.Demands()}
	for _, x := range gw.egress.Troubles() {
		name := x.Service[:min(len(x.Service), maxNamed)]
		t.Ejections = append(t.Ejections, mesh.Ejection{Service: name, Address: x.Address, Kind: x.Kind, Since: x.Since.UTC(), Why: x.Why})
	}
	return t
}

// serveTroubles lists what is held against hosts and their addresses.
func (gw *gateway) serveTroubles(w http.ResponseWriter, _ *http.Request) {
	list := gw.egress.Troubles()
	if list == nil {
		list = []upstream.Trouble{}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list) // whoever asked has gone
}
