package svid

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// secretType is the only type that is served.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// sdsService begins the method names of SDS. Envoy does not send the security
// header there, and neither does SPIRE ask for it.
const sdsService = "/envoy.service.secret.v3.SecretDiscoveryService/"

// An sdsAPI serves the same identities as the Workload API to an Envoy, as
// secrets of SDS v3. The caller is attested in the same way, before every
// message.
type sdsAPI struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	w *WorkloadAPI
}

// FetchSecrets answers once.
func (a *sdsAPI) FetchSecrets(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if err := checkNames(r.GetTypeUrl(), r.GetResourceNames()); err != nil {
		return nil, err
	}
	g, err := a.w.attest(ctx, "FetchSecrets", spiffeid.ID{})
	if err != nil {
		return nil, err
	}
	got, err := wanted(secretMaker{g, wantsPlain(r.GetNode())}, r.GetResourceNames())
	if err != nil {
		return nil, err
	}
	return worldState(got, ""), nil
}

func checkNames(typeURL string, names []string) error {
	if typeURL != "" && typeURL != secretType {
		return status.Errorf(codes.InvalidArgument, "type %.200q is not served here: want %s", typeURL, secretType)
	}
	if len(names) > maxNames {
		return status.Errorf(codes.InvalidArgument, "%d resource names, want at most %d", len(names), maxNames)
	}
	return nil
}

// wanted gives the secrets of these names, or all without names. A name that
// the caller may not have ends the call: Envoy asks again, and by then there
// may be an entry.
func wanted(m secretMaker, names []string) ([]secret, error) {
	if len(names) == 0 {
		return m.all()
	}
	got, err := m.named(names)
	if err == nil && len(got) < len(names) {
		return nil, status.Error(codes.PermissionDenied, "a resource name is not one of: default, ROOTCA, ALL, a SPIFFE ID of the caller, a trust domain it may trust")
	}
	return got, err
}

// worldState is the full state in the form of Stream and Fetch.
func worldState(got []secret, nonce string) *discoveryv3.DiscoveryResponse {
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType, Nonce: nonce, ControlPlane: &corev3.ControlPlane{Identifier: "sallyport"}}
	h := sha256.New()
	for _, s := range got {
		resp.Resources = append(resp.Resources, s.body)
		h.Write([]byte(s.name + "\x00" + s.version + "\x00"))
	}
	resp.VersionInfo = hex.EncodeToString(h.Sum(nil)[:8])
	return resp
}

func newNonce() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// converse runs one stream: it hands each request to take, and calls push
// after a request that asks for it and after each change of the state.
func converse[Q any](a *sdsAPI, ctx context.Context, method string, recv func() (Q, error), take func(Q) (send bool, err error), push func(*grant) error) error {
	p, err := peerOf(ctx)
	if err != nil {
		return err
	}
	type step struct {
		req Q
		err error
	}
	steps := make(chan step)
	go func() { // ends with the stream
		for {
			q, err := recv()
			select {
			case steps <- step{q, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	var changed <-chan struct{} // nil before the first request
	for {
		send := false
		select {
		case s := <-steps:
			if s.err != nil {
				return status.FromContextError(context.Canceled).Err() // the other side has left
			}
			if send, err = take(s.req); err != nil {
				return err
			}
		case <-changed:
			send = true
		case <-tick.C:
			if err := p.check(); err != nil {
				return status.Error(codes.PermissionDenied, "the process that opened this connection has changed")
			}
		case <-p.pidfd.Done():
			return status.Error(codes.PermissionDenied, "the process that opened this connection has ended")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
		if !send {
			continue
		}
		changed = a.w.cfg.Source.Changed()
		g, err := a.w.attest(ctx, method, spiffeid.ID{})
		if err != nil {
			return err
		}
		if err := push(g); err != nil {
			return err
		}
	}
}

// refused notes that an Envoy did not take what it was sent. It keeps what it
// had, and gets the next state when there is one.
func (a *sdsAPI) refused(ctx context.Context, e *rpcstatus.Status) {
	pid := 0
	if p, err := peerOf(ctx); err == nil {
		pid = p.process.PID
	}
	a.w.cfg.Log.Warn("SDS: Envoy refused a secret", "pid", pid, "code", codes.Code(e.GetCode()).String(), "detail", firstOf(e.GetMessage(), 300))
}

func firstOf(s string, n int) string { return s[:min(len(s), n)] }

// StreamSecrets sends the full state at each change.
func (a *sdsAPI) StreamSecrets(s secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	var (
		names          []string
		began, plain   bool
		nonce, version string
	)
	take := func(r *discoveryv3.DiscoveryRequest) (bool, error) {
		if err := checkNames(r.GetTypeUrl(), r.GetResourceNames()); err != nil {
			return false, err
		}
		if r.GetErrorDetail() != nil {
			a.refused(s.Context(), r.GetErrorDetail())
		}
		if began && r.GetResponseNonce() != nonce {
			return false, nil // an answer to what is no longer the newest
		}
		fresh := slices.Clone(r.GetResourceNames())
		slices.Sort(fresh)
		fresh = slices.Compact(fresh)
		if began && slices.Equal(fresh, names) {
			return false, nil
		}
		if !began {
			plain = wantsPlain(r.GetNode()) // only the first request must name it
		} else if len(fresh) == 0 {
			return false, status.Error(codes.InvalidArgument, "a subscription by name cannot become one to everything")
		}
		began, names, version = true, fresh, ""
		return true, nil
	}
	push := func(g *grant) error {
		got, err := wanted(secretMaker{g, plain}, names)
		if err != nil {
			return err
		}
		resp := worldState(got, newNonce())
		if resp.VersionInfo == version {
			return nil // the change was of something else
		}
		nonce, version = resp.Nonce, resp.VersionInfo
		return s.Send(resp)
	}
	return converse(a, s.Context(), "StreamSecrets", s.Recv, take, push)
}

// A deltaState is what one incremental stream has asked for and been sent.
type deltaState struct {
	began, plain bool
	everything   bool
	names        map[string]bool
	sent         map[string]string // version by name, "" for told to be absent
}

// take reads the subscription changes of a request.
func (d *deltaState) take(r *discoveryv3.DeltaDiscoveryRequest) (send bool, err error) {
	if err := checkNames(r.GetTypeUrl(), append(slices.Clone(r.GetResourceNamesSubscribe()), r.GetResourceNamesUnsubscribe()...)); err != nil {
		return false, err
	}
	first := !d.began
	if first {
		d.began, send = true, true
		d.plain = wantsPlain(r.GetNode())
		d.everything = len(r.GetResourceNamesSubscribe()) == 0
		for n, v := range r.GetInitialResourceVersions() {
			if len(d.sent) == maxNames {
				return false, status.Errorf(codes.InvalidArgument, "more than %d initial versions", maxNames)
			}
			d.sent[n] = v
		}
	}
	for _, n := range r.GetResourceNamesUnsubscribe() {
		if n == "*" {
			d.everything = false
		}
		delete(d.names, n)
		delete(d.sent, n)
	}
	for _, n := range r.GetResourceNamesSubscribe() {
		send = true
		if n == "*" {
			d.everything = true
			continue
		}
		d.names[n] = true
		if !first { // asked for again: sent again
			delete(d.sent, n)
		}
	}
	if len(d.names) > maxNames {
		return false, status.Errorf(codes.InvalidArgument, "%d resource names, want at most %d", len(d.names), maxNames)
	}
	return send, nil
}

// difference is what changed since the last message.
func (d *deltaState) difference(m secretMaker) (*discoveryv3.DeltaDiscoveryResponse, error) {
	var now []secret
	var err error
	if d.everything {
		if now, err = m.all(); err != nil {
			return nil, err
		}
	}
	have := map[string]bool{}
	for _, s := range now {
		have[s.name] = true
	}
	for n := range d.names {
		if have[n] {
			continue
		}
		s, ok, err := m.one(n)
		if err != nil {
			return nil, err
		}
		if have[n] = ok; ok {
			now = append(now, s)
		}
	}
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: secretType, Nonce: newNonce(), ControlPlane: &corev3.ControlPlane{Identifier: "sallyport"}}
	for _, s := range now {
		if d.sent[s.name] != s.version {
			d.sent[s.name] = s.version
			resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: s.name, Version: s.version, Resource: s.body})
		}
	}
	for n := range d.names {
		if _, told := d.sent[n]; !have[n] && !told {
			resp.RemovedResources, d.sent[n] = append(resp.RemovedResources, n), ""
		}
	}
	for n, v := range d.sent {
		if !have[n] && v != "" {
			resp.RemovedResources = append(resp.RemovedResources, n)
			if d.sent[n] = ""; !d.names[n] {
				delete(d.sent, n)
			}
		}
	}
	slices.Sort(resp.RemovedResources)
	slices.SortFunc(resp.Resources, func(a, b *discoveryv3.Resource) int { return cmp.Compare(a.Name, b.Name) })
	return resp, nil
}

// DeltaSecrets sends what changed.
func (a *sdsAPI) DeltaSecrets(s secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	d := &deltaState{names: map[string]bool{}, sent: map[string]string{}}
	take := func(r *discoveryv3.DeltaDiscoveryRequest) (bool, error) {
		if r.GetErrorDetail() != nil {
			a.refused(s.Context(), r.GetErrorDetail())
		}
		return d.take(r)
	}
	push := func(g *grant) error {
		resp, err := d.difference(secretMaker{g, d.plain})
		if err != nil || len(resp.Resources)+len(resp.RemovedResources) == 0 {
			return err
		}
		return s.Send(resp)
	}
	return converse(a, s.Context(), "DeltaSecrets", s.Recv, take, push)
}
