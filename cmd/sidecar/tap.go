package main

import (
	"encoding/json"
	"net/http"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// longestTap ends a tap that somebody has forgotten.
const longestTap = 10 * time.Minute

// serveTap shows calls as they end, one JSON document a line. Only our own user and
// root reach the socket; who looks, and at what, is recorded before anything is
// shown.
func (s *sidecar) serveTap(w http.ResponseWriter, r *http.Request) {
	filter, err := mesh.ParseTapFilter(r.URL.RawQuery)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	who := daemon.Caller(r)
	if who == "" {
		http.Error(w, "nobody knows who asks", http.StatusForbidden)
		return
	}
	tap, ok := s.taps.Open(filter)
	if !ok {
		http.Error(w, "as many look already as may; end one of them", http.StatusTooManyRequests)
		return
	}
	defer s.taps.Close(tap)
	rec := audit.Record{Kind: audit.KindAdmin, Decision: audit.Allow, Verb: "tap", Peer: who, Detail: "calls are shown as they end; filter: " + filter.Query()}
	if err := s.audit.Append(&rec); err != nil {
		http.Error(w, "it could not be recorded who looks, so nothing is shown", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out, show := json.NewEncoder(w), http.NewResponseController(w)
	end := time.NewTimer(longestTap)
	defer end.Stop()
	for err := show.Flush(); err == nil; err = show.Flush() {
		select {
		case c := <-tap.Calls:
			if out.Encode(c) != nil {
				return
			}
		case <-end.C:
			return
		case <-r.Context().Done():
			return
		}
	}
}
