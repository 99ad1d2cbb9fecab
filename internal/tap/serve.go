package tap

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// A Recorder keeps audit records; what Append has returned nil for is kept.
type Recorder interface {
	Append(*audit.Record) error
}

var (
	errUnrecorded = errors.New("it could not be recorded who looks, so nothing is shown")
	errCrowded    = errors.New("as many look already as may; end one of them")
	errHasty      = errors.New("a look through the issuer began less than a second ago; look again")
)

// look begins to look, once it is recorded who does, at what.
func (t *Taps) look(to Recorder, who string, afar bool, f mesh.TapFilter) (*Tap, error) {
	one, err := t.open(f, afar)
	if err != nil {
		return nil, err
	}
	way := ""
	if afar {
		way = "through the issuer "
	}
	rec := audit.Record{Kind: audit.KindAdmin, Decision: audit.Allow, Verb: "tap", Peer: who, Detail: "calls are shown " + way + "as they end; filter: " + f.Query()}
	if err := to.Append(&rec); err != nil {
		t.Close(one)
		return nil, errUnrecorded
	}
	return one, nil
}

// Handler shows calls on an admin socket, one JSON document a line. Only the
// process's own user and root reach that.
func (t *Taps) Handler(to Recorder) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
		one, err := t.look(to, who, false, filter)
		switch {
		case errors.Is(err, errCrowded):
			http.Error(w, err.Error(), http.StatusTooManyRequests)
			return
		case err != nil:
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		defer t.Close(one)
		w.Header().Set("Content-Type", "application/x-ndjson")
		out, show := json.NewEncoder(w), http.NewResponseController(w)
		end := time.NewTimer(mesh.LongestTap)
		defer end.Stop()
		for err := show.Flush(); err == nil; err = show.Flush() {
			select {
			case c := <-one.Calls:
				if out.Encode(c) != nil {
					return
				}
			case <-end.C:
				return
			case <-r.Context().Done():
				return
			}
		}
	})
}

// gather is how long calls are gathered that go to the issuer together, and
// maxGathered how many those are. More, and they are missed.
const (
	gather      = 200 * time.Millisecond
	maxGathered = 64
)

// Passer shows calls to an operator who has asked the issuer.
func (t *Taps) Passer(to Recorder) func(context.Context, control.Look) error {
	return func(ctx context.Context, l control.Look) error {
		one, err := t.look(to, l.By, true, l.Filter)
		if err != nil {
			return err
		}
		defer t.Close(one)
		if err := l.Show(nil); err != nil { // it has begun
			return err
		}
		pace := time.NewTicker(gather)
		defer pace.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-pace.C:
			}
			var list []*mesh.Tapped
			for range min(len(one.Calls), maxGathered) {
				list = append(list, <-one.Calls)
			}
			if len(list) == 0 {
				continue
			}
			if err := l.Show(list); err != nil {
				return err
			}
		}
	}
}
