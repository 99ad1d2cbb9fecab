package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/federation"
	"sallyport/internal/mesh"
	"sallyport/internal/registry"
)

// fileOrigin is where a federation stands that calls cannot change.
const fileOrigin = "the configuration of the issuer, under federation"

// federations are those of the configuration and those made by calls, as the
// control server sees them. Where both speak of a trust domain, the file holds.
type federations struct {
	in *issuer

	mu sync.Mutex // guards applied, and lets one apply run at a time
	// applied is what the follower was last told of those made by calls.
	applied map[spiffeid.TrustDomain]registry.Federation
}

// declared is the federation of the configuration with td.
func (f *federations) declared(td spiffeid.TrustDomain) bool {
	return slices.ContainsFunc(f.in.cfg.Federation, func(c FederationConfig) bool { return c.TrustDomain == td })
}

// byCall are the federations made by calls that count.
func (f *federations) byCall() []registry.Federation {
	return slices.DeleteFunc(f.in.registry.Federations(), func(r registry.Federation) bool { return f.declared(r.TrustDomain) })
}

// Federations is control.Federator.
func (f *federations) Federations() (out []control.Federation) {
	for _, r := range f.in.cfg.relationships() {
		out = append(out, control.Federation{TrustDomain: r.TrustDomain, URL: r.URL, Profile: r.Profile, EndpointID: r.EndpointID, Origin: fileOrigin})
	}
	for _, r := range f.byCall() {
		out = append(out, toControl(r))
	}
	slices.SortFunc(out, func(a, b control.Federation) int { return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return out
}

func toControl(r registry.Federation) control.Federation {
	return control.Federation{TrustDomain: r.TrustDomain, URL: r.URL, Profile: r.Profile, EndpointID: r.EndpointID}
}

func relationship(r registry.Federation) federation.Relationship {
	return federation.Relationship{TrustDomain: r.TrustDomain, URL: r.URL, Profile: r.Profile, EndpointID: r.EndpointID}
}

// EditFederation is control.Federator.
func (f *federations) EditFederation(ctx context.Context, td spiffeid.TrustDomain, change func(control.Federation) (control.Federation, error)) error {
	if f.declared(td) {
		return fmt.Errorf("federation with %s %w: %s", td, mesh.ErrReviewed, fileOrigin)
	}
	err := f.in.registry.EditFederation(ctx, td, func(old registry.Federation) (registry.Federation, error) {
		next, err := change(toControl(old))
		if err != nil || next.TrustDomain.IsZero() {
			return registry.Federation{}, err
		}
		r := old
		r.TrustDomain, r.URL, r.Profile, r.EndpointID = td, next.URL, next.Profile, next.EndpointID
		if r.URL != "" {
			if err := relationship(r).Validate(); err != nil {
				return r, control.Unfit(err)
			}
		}
		switch {
		case next.Bundle != nil:
			if r.Bundle, err = document(td, next.Bundle); err != nil {
				return r, control.Unfit(err)
			}
			r.Given = time.Now().UTC()
		case next.Void || old.TrustDomain.IsZero():
			// What an earlier federation may have left behind is void too.
			r.Bundle, r.Given = nil, time.Now().UTC()
		}
		return r, nil
	})
	if err == nil {
		f.apply()
	}
	return err
}

// document is a bundle in the form of SPIFFE, which is read back as any that is
// fetched.
func document(td spiffeid.TrustDomain, b *control.FederatedBundle) ([]byte, error) {
	out := federation.Bundle{TrustDomain: td, X509: b.X509, Sequence: b.Sequence, RefreshHint: b.RefreshHint}
	for _, k := range b.JWT {
		out.JWT = append(out.JWT, federation.Key{ID: k.KeyID, Public: k.PublicKey})
	}
	doc, err := out.Encode()
	if err != nil {
		return nil, err
	}
	if len(doc) > federation.MaxDocument {
		return nil, fmt.Errorf("the bundle has %d bytes, at most %d are kept", len(doc), federation.MaxDocument)
	}
	_, err = federation.Decode(td, doc)
	return doc, err
}

// RefreshBundle is control.Federator.
func (f *federations) RefreshBundle(ctx context.Context, td spiffeid.TrustDomain) error {
	for _, r := range f.followed() {
		if r.TrustDomain == td {
			return f.in.follower.Refresh(ctx, r)
		}
	}
	return mesh.ErrNotFound
}

// followed are the relationships of the file and of calls.
func (f *federations) followed() []federation.Relationship {
	out := f.in.cfg.relationships()
	for _, r := range f.byCall() {
		if r.URL != "" {
			out = append(out, relationship(r))
		}
	}
	return out
}

// apply lets the follower do what calls made known.
func (f *federations) apply() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := map[spiffeid.TrustDomain]registry.Federation{}
	for _, r := range f.byCall() {
		now[r.TrustDomain] = r
		if old, known := f.applied[r.TrustDomain]; !known || !old.Given.Equal(r.Given) {
			f.give(r)
		}
	}
	f.in.follower.Follow(f.followed())
	for td := range f.applied {
		if _, still := now[td]; !still && !f.declared(td) {
			f.drop(td)
		}
	}
	f.applied = now
}

// give lets the follower hold what was given, or was fetched after that.
func (f *federations) give(r registry.Federation) {
	if kept, at := f.in.lastFetched(r.TrustDomain); kept != nil && at.After(r.Given) {
		f.in.follower.Hold(kept)
		return
	}
	if len(r.Bundle) == 0 {
		f.drop(r.TrustDomain)
		return
	}
	b, err := federation.Decode(r.TrustDomain, r.Bundle)
	if err != nil {
		// It was read when it was given.
		f.in.log.Error("bundle that was given is of no use", "trust_domain", r.TrustDomain.Name(), "err", err)
		return
	}
	f.in.follower.Hold(b)
}

// drop forgets the bundle of a trust domain, also for the next start.
func (f *federations) drop(td spiffeid.TrustDomain) {
	f.in.follower.Forget(td)
	if err := os.Remove(f.in.keptBundle(td)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.in.log.Error("bundle not removed", "trust_domain", td.Name(), "err", err)
	}
}
