package control

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/timestamppb"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// requestKey takes the public key from a certificate request and nothing else:
// who the certificate names is decided by attestation.
func requestKey(der []byte) (crypto.PublicKey, error) {
	if len(der) == 0 {
		return nil, errors.New("certificate request is missing")
	}
	if len(der) > maxCSR {
		return nil, fmt.Errorf("certificate request has %d bytes, at most %d are read", len(der), maxCSR)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, errors.New("certificate request is not valid DER of PKCS #10")
	}
	if err := checkKey(r.PublicKey); err != nil {
		return nil, err
	}
	if err := r.CheckSignature(); err != nil {
		return nil, errors.New("certificate request is not signed by its own key")
	}
	return r.PublicKey, nil
}

// checkKey is the key policy.
func checkKey(key crypto.PublicKey) error {
	const want = "use EC P-256 or P-384, or RSA of 2048 to 4096 bits"
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("key is EC %s: %s", k.Curve.Params().Name, want)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("key is RSA of %d bits: %s", n, want)
		}
		return nil
	}
	return fmt.Errorf("key is of an unknown kind: %s", want)
}

func idToWire(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func idFromWire(id *types.SPIFFEID) (spiffeid.ID, error) {
	if id == nil {
		return spiffeid.ID{}, errors.New("SPIFFE ID is missing")
	}
	td, err := spiffeid.TrustDomainFromString(id.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("read trust domain: %w", err)
	}
	out, err := spiffeid.FromPath(td, id.Path)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("read SPIFFE ID path: %w", err)
	}
	if len(out.String()) > maxID {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID is longer than %d bytes", maxID)
	}
	return out, nil
}

// workloadID reads the SPIFFE ID of a workload in td, as text.
func workloadID(s string, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if len(s) > maxID {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID is longer than %d bytes", maxID)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("read SPIFFE ID: %w", err)
	}
	if !id.MemberOf(td) || id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("%s is not a workload of %s", id, td)
	}
	return id, nil
}

func entryToWire(e mesh.Entry, revision int64) *types.Entry {
	return &types.Entry{
		Id:             e.ID,
		SpiffeId:       idToWire(e.SPIFFEID),
		ParentId:       idToWire(e.ParentID),
		Selectors:      selectorsToWire(e.Selectors),
		X509SvidTtl:    seconds(e.X509TTL),
		JwtSvidTtl:     seconds(e.JWTTTL),
		DnsNames:       e.DNSNames,
		Hint:           e.Hint,
		FederatesWith:  domainsToWire(e.FederatesWith),
		RevisionNumber: revision,
		Admin:          e.Admin,
		Downstream:     e.Downstream,
		ExpiresAt:      unix(e.ExpiresAt),
		CreatedAt:      unix(e.CreatedAt),
	}
}

// unix is 0 for the zero time.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func timeOfUnix(s int64) time.Time {
	if s <= 0 || s > maxUnix {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}

func entryFromWire(w *types.Entry) (mesh.Entry, error) {
	if w.GetId() == "" {
		return mesh.Entry{}, errors.New("entry has no id")
	}
	id, err := idFromWire(w.SpiffeId)
	if err != nil {
		return mesh.Entry{}, fmt.Errorf("entry %q: %w", w.Id, err)
	}
	parent, err := idFromWire(w.ParentId)
	if err != nil {
		return mesh.Entry{}, fmt.Errorf("entry %q: parent: %w", w.Id, err)
	}
	federates, err := domainsFromWire(w.FederatesWith)
	if err != nil {
		return mesh.Entry{}, fmt.Errorf("entry %q: federates with: %w", w.Id, err)
	}
	return mesh.Entry{
		ID:        w.Id,
		SPIFFEID:  id,
		ParentID:  parent,
		Selectors: selectorsFromWire(w.Selectors),
		X509TTL:   time.Duration(w.X509SvidTtl) * time.Second,
		JWTTTL:    time.Duration(w.JwtSvidTtl) * time.Second,
		DNSNames:  w.DnsNames,
		Hint:      w.Hint,

		Admin:         w.Admin,
		Downstream:    w.Downstream,
		ExpiresAt:     timeOfUnix(w.ExpiresAt),
		CreatedAt:     timeOfUnix(w.CreatedAt),
		FederatesWith: federates,
	}, nil
}

// seconds rounds up, so that a lifetime set never becomes the default.
func seconds(d time.Duration) int32 {
	s := int64((d + time.Second - 1) / time.Second)
	return int32(min(max(s, 0), math.MaxInt32))
}

func selectorsToWire(in []mesh.Selector) []*types.Selector {
	out := make([]*types.Selector, len(in))
	for i, s := range in {
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out
}

func selectorsFromWire(in []*types.Selector) []mesh.Selector {
	out := make([]mesh.Selector, len(in))
	for i, s := range in {
		out[i] = mesh.Selector{Type: s.GetType(), Value: s.GetValue()}
	}
	return out
}

func chainToWire(id spiffeid.ID, chain []*x509.Certificate) (*types.X509SVID, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("authority returned no certificate for %s", id)
	}
	w := &types.X509SVID{Id: idToWire(id), ExpiresAt: chain[0].NotAfter.Unix()}
	for _, c := range chain {
		w.CertChain = append(w.CertChain, c.Raw)
	}
	return w, nil
}

// chainFromWire reads an SVID and checks that it is for key and names id.
func chainFromWire(w *types.X509SVID, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error) {
	if len(w.GetCertChain()) == 0 {
		return nil, errors.New("issuer returned no certificate")
	}
	chain := make([]*x509.Certificate, len(w.CertChain))
	for i, der := range w.CertChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read certificate %d of the chain: %w", i, err)
		}
		chain[i] = c
	}
	got, err := leafID(chain[0])
	if err != nil {
		return nil, err
	}
	if !id.IsZero() && got != id {
		return nil, fmt.Errorf("issuer returned an SVID of %s, want %s", got, id)
	}
	if k, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(chain[0].PublicKey) {
		return nil, errors.New("issuer returned an SVID for another key")
	}
	return chain, nil
}

func agentToWire(a mesh.Agent) *types.Agent {
	return &types.Agent{
		Id:                   idToWire(a.ID),
		AttestationType:      a.AttestationType,
		X509SvidSerialNumber: a.Serial,
		X509SvidExpiresAt:    a.ExpiresAt.Unix(),
		Selectors:            selectorsToWire(a.Selectors),
		Banned:               a.Banned,
		CanReattest:          a.AttestationType != "join_token",
	}
}

func agentFromWire(w *types.Agent) (mesh.Agent, error) {
	id, err := idFromWire(w.GetId())
	if err != nil {
		return mesh.Agent{}, err
	}
	return mesh.Agent{
		ID:              id,
		AttestationType: w.AttestationType,
		Selectors:       selectorsFromWire(w.Selectors),
		Serial:          w.X509SvidSerialNumber,
		ExpiresAt:       time.Unix(w.X509SvidExpiresAt, 0),
		Banned:          w.Banned,
	}, nil
}

// bundleFromWire reads a bundle of td. A bundle without a usable root is refused:
// it would make every SVID invalid.
func bundleFromWire(w *types.Bundle, td spiffeid.TrustDomain) (Bundle, error) {
	if w.GetTrustDomain() != td.Name() {
		return Bundle{}, fmt.Errorf("%w: bundle is of %.255q, want %s", ErrTrustDomain, w.GetTrustDomain(), td)
	}
	b := Bundle{RefreshHint: time.Duration(min(max(w.GetRefreshHint(), 0), 24*3600)) * time.Second}
	for i, a := range w.GetX509Authorities() {
		c, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return Bundle{}, fmt.Errorf("read authority %d of the bundle: %w", i, err)
		}
		b.X509 = append(b.X509, c)
		if a.GetTainted() {
			b.Tainted = append(b.Tainted, c)
		}
	}
	if len(b.X509) == 0 {
		return Bundle{}, errors.New("bundle has no X.509 authority")
	}
	for _, k := range w.GetJwtAuthorities() {
		if k.GetKeyId() == "" {
			continue
		}
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return Bundle{}, fmt.Errorf("read JWT key %.64q of the bundle: %w", k.GetKeyId(), err)
		}
		j := JWTKey{KeyID: k.GetKeyId(), PublicKey: key, Tainted: k.GetTainted()}
		if k.GetExpiresAt() > 0 {
			j.ExpiresAt = time.Unix(k.GetExpiresAt(), 0)
		}
		b.JWT = append(b.JWT, j)
	}
	return b, nil
}

func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// timeFromWire reads an absent or impossible time as zero.
func timeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil || t.CheckValid() != nil {
		return time.Time{}
	}
	return t.AsTime()
}

func edgeToWire(e mesh.Edge) *meshpb.Edge {
	return &meshpb.Edge{
		Src: e.Src, Dst: e.Dst, Proto: e.Proto,
		Allowed: e.Allowed, Denied: e.Denied, Errors: e.Errors, Mtls: e.MTLS,
		First: timeToWire(e.First), Last: timeToWire(e.Last), Took: e.Took,
	}
}

func edgeFromWire(w *meshpb.Edge) mesh.Edge {
	return mesh.Edge{
		Src: w.GetSrc(), Dst: w.GetDst(), Proto: w.GetProto(),
		Allowed: w.GetAllowed(), Denied: w.GetDenied(), Errors: w.GetErrors(), MTLS: w.GetMtls(),
		First: timeFromWire(w.GetFirst()), Last: timeFromWire(w.GetLast()), Took: w.GetTook(),
	}
}

func endpointFromWire(w *meshpb.Endpoint, agent spiffeid.ID) (mesh.Endpoint, error) {
	name := w.GetService()
	if name == "" || len(name) > 63 {
		return mesh.Endpoint{}, fmt.Errorf("endpoint: service %.64q is not a service name", name)
	}
	addr, err := netip.ParseAddrPort(w.GetAddress())
	if err != nil {
		return mesh.Endpoint{}, fmt.Errorf("endpoint of %s: address %.64q is not an IP address and port", name, w.GetAddress())
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if ip := addr.Addr(); addr.Port() == 0 || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip.Zone() != "" {
		return mesh.Endpoint{}, fmt.Errorf("endpoint of %s: others cannot reach %s: announce a concrete address and port", name, addr)
	}
	labels, err := mesh.NewLabels(w.GetLabels())
	if err != nil {
		return mesh.Endpoint{}, fmt.Errorf("endpoint of %s: %w", name, err)
	}
	return mesh.Endpoint{Service: mesh.ServiceName(name), Address: addr, Agent: agent, Labels: labels}, nil
}

// maxVersion is how long a version may be that a proxy says of itself.
const maxVersion = 64

// versionFromWire is what a proxy says of itself, for people to read: anything but
// a short line of printable ASCII is nothing.
func versionFromWire(s string) string {
	if len(s) > maxVersion || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return ""
	}
	return s
}

func proxyToWire(p mesh.Proxy) *meshpb.Proxy {
	w := &meshpb.Proxy{
		Workload: p.Workload.String(), Kind: p.Kind, Version: p.Version,
		SvidExpires: timeToWire(p.SVIDExpires), PolicyRevision: p.PolicyRevision,
		State: string(p.State), Reason: p.Reason, Connected: p.Connected, LastSeen: timeToWire(p.LastSeen),
		Revoked: p.Revoked, CandidateRefused: p.CandidateRefused, Verified: p.Verified,
		Since: timeToWire(p.Since), PolicyHash: p.PolicyHash, Wanted: p.Wanted, Group: p.Group, Traffic: trafficToWire(p.Traffic),
	}
	if !p.Agent.IsZero() {
		w.Agent = p.Agent.String()
	}
	return w
}

func proxyFromWire(w *meshpb.Proxy) (mesh.Proxy, error) {
	p := mesh.Proxy{
		Kind: w.GetKind(), Version: w.GetVersion(), SVIDExpires: timeFromWire(w.GetSvidExpires()), PolicyRevision: w.GetPolicyRevision(),
		State: mesh.ProxyState(w.GetState()), Reason: w.GetReason(), Connected: w.GetConnected(), LastSeen: timeFromWire(w.GetLastSeen()),
		Revoked: w.GetRevoked(), CandidateRefused: w.GetCandidateRefused(), Verified: w.GetVerified(),
		Since: timeFromWire(w.GetSince()), PolicyHash: w.GetPolicyHash(), Wanted: w.GetWanted(), Group: w.GetGroup(),
	}
	var err error
	if p.Traffic, err = trafficFromWire(w.GetTraffic()); err != nil {
		return p, fmt.Errorf("proxy: %w", err)
	}
	if p.Workload, err = spiffeid.FromString(w.GetWorkload()); err != nil {
		return p, fmt.Errorf("proxy: workload: %w", err)
	}
	if w.GetAgent() != "" {
		if p.Agent, err = spiffeid.FromString(w.GetAgent()); err != nil {
			return p, fmt.Errorf("proxy: agent: %w", err)
		}
	}
	return p, nil
}
