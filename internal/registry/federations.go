package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/store"
)

// maxFederations bounds the trust domains that calls make known.
const maxFederations = 1000

// A Federation is what calls made known of another trust domain.
type Federation struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	// URL is empty when its bundle is given and not fetched. Profile and
	// EndpointID say how the endpoint is verified.
	URL        string      `json:"url,omitempty"`
	Profile    string      `json:"profile,omitempty"`
	EndpointID spiffeid.ID `json:"endpoint_id,omitzero"`
	// Bundle is the document that an operator gave, and Given when. Without a
	// document, what was known before Given is void.
	Bundle []byte    `json:"bundle,omitempty"`
	Given  time.Time `json:"given,omitzero"`

	revision int64
}

// federations is all of them.
type federations struct {
	mu      sync.Mutex // guards the fields below
	all     map[spiffeid.TrustDomain]Federation
	changed chan struct{}
}

// Federations returns what calls made known, by name of the trust domain.
func (r *Registry) Federations() []Federation {
	r.federations.mu.Lock()
	defer r.federations.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.federations.all), func(a, b Federation) int {
		return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name())
	})
}

// FederationsChanged returns a channel that is closed when Federations next
// change, here or at another issuer.
func (r *Registry) FederationsChanged() <-chan struct{} {
	r.federations.mu.Lock()
	defer r.federations.mu.Unlock()
	return r.federations.changed
}

// EditFederation changes what is known of a trust domain, durably. Change is
// given that, zero when nothing is, and returns what shall be; zero forgets. It
// may be called again. Its error is returned as it is.
func (r *Registry) EditFederation(ctx context.Context, td spiffeid.TrustDomain, change func(Federation) (Federation, error)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		err := r.editFederation(ctx, td, change)
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
		// Another issuer was faster.
		if err := r.loadFederations(ctx); err != nil {
			return err
		}
	}
}

// editFederation is one attempt. mu is held.
func (r *Registry) editFederation(ctx context.Context, td spiffeid.TrustDomain, change func(Federation) (Federation, error)) error {
	r.federations.mu.Lock()
	old, known := r.federations.all[td]
	n := len(r.federations.all)
	r.federations.mu.Unlock()
	next, err := change(old)
	if err != nil {
		return err
	}
	op := store.Op{Kind: store.KindBundle, Key: td.Name(), IfRevision: &old.revision}
	if next.TrustDomain.IsZero() {
		if !known {
			return nil
		}
		op.Delete = true
	} else {
		if !known && n >= maxFederations {
			return fmt.Errorf("%d trust domains are federated already, which is the most", n)
		}
		next.TrustDomain = td
		if op.Value, err = json.Marshal(next); err != nil {
			return fmt.Errorf("federate with %s: encode: %w", td, err)
		}
	}
	if _, err := r.write(ctx, op); err != nil {
		return fmt.Errorf("federate with %s: %w", td, err)
	}
	return r.loadFederations(ctx)
}

// loadFederations reads what calls made known. mu is held.
func (r *Registry) loadFederations(ctx context.Context) error {
	records, err := r.list(ctx, store.KindBundle)
	if err != nil {
		return fmt.Errorf("load federations: %w", err)
	}
	all := make(map[spiffeid.TrustDomain]Federation, len(records))
	for _, rec := range records {
		var f Federation
		if err := json.Unmarshal(rec.Value, &f); err != nil {
			return fmt.Errorf("load federation with %q: %w", rec.Key, err)
		}
		if f.TrustDomain.Name() != rec.Key {
			return fmt.Errorf("load federation with %q: the record is of %q", rec.Key, f.TrustDomain.Name())
		}
		f.revision = rec.Revision
		all[f.TrustDomain] = f
	}
	r.federations.mu.Lock()
	defer r.federations.mu.Unlock()
	if maps.EqualFunc(r.federations.all, all, func(a, b Federation) bool { return a.revision == b.revision }) {
		return nil
	}
	r.federations.all = all
	close(r.federations.changed)
	r.federations.changed = make(chan struct{})
	return nil
}
