package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/capture"
	"sallyport/internal/hop"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/record"
	"sallyport/internal/svid"
)

const (
	// handshakeWithin bounds one handshake that is made to see whether it can be.
	handshakeWithin = 5 * time.Second
	// hangUpWithin is how long a peer may take to refuse our certificate, which
	// in TLS 1.3 it sees after our end of the handshake is done.
	hangUpWithin = 500 * time.Millisecond
	// mostHandshakes are the endpoints that one question is about.
	mostHandshakes = 32
)

// answerJSON answers a question on the admin socket.
func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // who asked may have gone
}

// serveIdentity tells which identity is served.
func (s *sidecar) serveIdentity(w http.ResponseWriter, _ *http.Request) {
	self, err := s.agent.Self()
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	leaf := self.Chain[0]
	r := mesh.IdentityReport{Identity: self.ID, Issued: leaf.NotBefore, Expires: leaf.NotAfter, Serial: leaf.SerialNumber.Text(16), Entry: self.EntryID}
	for _, e := range s.agent.Entries() {
		if e.ID == self.EntryID {
			r.Parent = e.ParentID
		}
	}
	answerJSON(w, r)
}

// serveProcess tells which identity a local process would be given, and what of
// the others it lacks. Nothing is given.
func (s *sidecar) serveProcess(w http.ResponseWriter, r *http.Request) {
	pid, err := strconv.Atoi(r.PathValue("pid"))
	if err != nil || pid <= 0 {
		http.Error(w, fmt.Sprintf("%q is not the number of a process", r.PathValue("pid")), http.StatusBadRequest)
		return
	}
	p, err := capture.Inspect(pid)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	have, err := s.selectorsOf(r.Context(), p)
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	out := mesh.ProcessReport{PID: p.PID, UID: p.UID, Exe: p.ExePath, Cgroup: p.Cgroup}
	for _, sel := range have {
		out.Selectors = append(out.Selectors, sel.String())
	}
	if self, err := s.agent.Self(); err == nil {
		out.Served = self.ID
	}
	for _, e := range s.agent.Entries() {
		out.Entries = append(out.Entries, compare(e, have))
	}
	answerJSON(w, out)
}

func compare(e mesh.Entry, have []mesh.Selector) mesh.EntryReport {
	r := mesh.EntryReport{ID: e.ID, SPIFFEID: e.SPIFFEID}
	for _, sel := range e.Selectors {
		if slices.Contains(have, sel) {
			r.Has = append(r.Has, sel.String())
		} else {
			r.Misses = append(r.Misses, sel.String())
		}
	}
	return r
}

// serveHandshakes makes a handshake with each endpoint of a service, as a call
// would, and sends nothing.
func (s *sidecar) serveHandshakes(w http.ResponseWriter, r *http.Request) {
	name := mesh.ServiceName(r.PathValue("service"))
	snap := s.agent.Snapshot()
	self, err := s.agent.Self()
	if err == nil && snap == nil {
		err = errors.New("there is no policy yet")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	svc, ok := snap.Service(name)
	if !ok {
		http.Error(w, fmt.Sprintf("%s knows no service %q: no row lets it call one of that name", self.ID, name), http.StatusNotFound)
		return
	}
	ends := snap.EndpointsOf(name)
	out := mesh.HandshakeReport{
		From: self.ID, Expires: self.Expires(), Service: name, Identity: svc.ID, Revision: snap.PolicyRevision,
		Handshakes: make([]mesh.Handshake, min(len(ends), mostHandshakes)),
	}
	alpn := []string{hop.Proto, http2.Proto, "http/1.1"}
	if svc.Protocol == mesh.TCP {
		alpn = nil
	}
	var all sync.WaitGroup
	for i := range out.Handshakes {
		all.Go(func() { out.Handshakes[i] = s.handshake(r.Context(), ends[i].Address, svc.ID, alpn) })
	}
	all.Wait()
	answerJSON(w, out)
}

// handshake connects to an address, which must prove to be want.
func (s *sidecar) handshake(ctx context.Context, to netip.AddrPort, want spiffeid.ID, alpn []string) mesh.Handshake {
	h := mesh.Handshake{Address: to}
	ctx, cancel := context.WithTimeout(ctx, handshakeWithin)
	defer cancel()
	start := time.Now()
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		h.Err = err.Error()
		return h
	}
	defer nc.Close()
	tc, err := record.Client(ctx, capture.NewDirect(nc), svid.ClientTLS(s.agent.Source(), want, alpn...))
	if err != nil {
		h.Err = "handshake: " + err.Error()
		return h
	}
	h.Took = time.Since(start)
	if err := tc.SetReadDeadline(time.Now().Add(hangUpWithin)); err != nil {
		h.Err = err.Error()
		return h
	}
	if _, err := tc.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		h.Err = "hung up after the handshake: " + err.Error()
		return h
	}
	describe(&h, tc.ConnectionState())
	return h
}

func describe(h *mesh.Handshake, cs tls.ConnectionState) {
	if id, err := svid.PeerID(cs); err == nil {
		h.Peer, h.Expires = id.String(), cs.PeerCertificates[0].NotAfter
	}
	h.Version, h.Cipher, h.Exchange, h.Protocol = tls.VersionName(cs.Version), tls.CipherSuiteName(cs.CipherSuite), cs.CurveID.String(), cs.NegotiatedProtocol
}
