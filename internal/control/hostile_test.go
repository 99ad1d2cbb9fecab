package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

// bytesAsSent sends bytes as they are, whatever message is due, and reads any
// answer.
type bytesAsSent struct{}

func (bytesAsSent) Name() string { return "proto" }
func (bytesAsSent) Marshal(v any) ([]byte, error) {
	if b, ok := v.(*[]byte); ok {
		return *b, nil
	}
	return nil, fmt.Errorf("cannot send a %T", v)
}
func (bytesAsSent) Unmarshal([]byte, any) error { return nil }

// hostile are messages that fit no method, or every one a little.
func hostile() map[string][]byte {
	var nested []byte
	for range 11_000 { // protobuf itself gives up at 10,000
		nested = append(protowire.AppendVarint([]byte{0x0a}, uint64(len(nested))), nested...)
	}
	var many, fields []byte
	for range 10_000 {
		many = append(many, 0x0a, 1, 'x')
	}
	for n := 1; n <= 12; n++ {
		fields = protowire.AppendBytes(protowire.AppendTag(fields, protowire.Number(n), protowire.BytesType), []byte("\x0a\xff\x00spiffe://other.example/x"))
		fields = protowire.AppendVarint(protowire.AppendTag(fields, protowire.Number(n), protowire.VarintType), 1<<63)
	}
	return map[string][]byte{
		"truncated":        {0x0a, 0x7f, 'x'},
		"half a varint":    {0x08, 0xff, 0xff},
		"a group unclosed": {0x0b, 0x0b, 0x0b},
		"not protobuf":     []byte("GET / HTTP/1.1\r\n\r\n"),
		"no UTF-8":         {0x0a, 2, 0xff, 0xfe},
		"wrong types":      fields,
		"10,000 of one":    many,
		"deeply nested":    nested,
		// Of long elements: to read many short ones takes the race detector minutes.
		"huge": bytes.Repeat(append([]byte{0x0a, 100}, bytes.Repeat([]byte("x"), 100)...), maxRequest/102+2),
	}
}

// TestHostileMessagesAreAnsweredInWords sends what no honest client does to every
// method, on both doors, as whoever may call it. Each is answered with a code
// and a sentence, none makes the issuer panic, and it serves on.
func TestHostileMessagesAreAnsweredInWords(t *testing.T) {
	seen := &calls{}
	r := manageRig(t, newFederates().with, func(c *ServerConfig) {
		c.Downstream, c.Roots, c.OnAdmin = &below{ca: c.Authority.(*ca)}, standing(), seen.note
	})
	_, h := r.joined("node-a")
	callers := map[string]*grpc.ClientConn{
		"none": r.raw(nil), "agent": r.raw(h.cert), "downstream": r.as(down), "admin": r.as(boss), "local": r.admin().cc,
	}
	messages := hostile()
	for _, m := range methods() {
		for who, cc := range callers {
			for what, msg := range messages {
				if err := sendRaw(t.Context(), cc, m, msg); err != nil {
					st := status.Convert(err)
					if st.Code() == codes.Unknown || st.Code() == codes.Unavailable || st.Code() == codes.DeadlineExceeded || !strings.Contains(st.Message(), " ") {
						t.Errorf("%s as %s, %s: %s: %.200q", m.name, who, what, st.Code(), st.Message())
					}
				}
			}
		}
	}
	if _, err := bundlev1.NewBundleClient(callers["none"]).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func sendRaw(ctx context.Context, cc *grpc.ClientConn, m method, msg []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	codec := grpc.ForceCodec(bytesAsSent{})
	if !m.stream {
		return cc.Invoke(ctx, m.name, &msg, &emptypb.Empty{}, codec)
	}
	st, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.clientStreams}, m.name, codec)
	if err != nil {
		return err
	}
	_ = st.SendMsg(&msg) // the answer says why it fails
	_ = st.CloseSend()
	if err := st.RecvMsg(&emptypb.Empty{}); err != io.EOF {
		return err
	}
	return nil
}

// TestHostileRequestsToSign are well formed, and ask for too much.
func TestHostileRequestsToSign(t *testing.T) {
	r := manageRig(t, func(c *ServerConfig) { c.Downstream = &below{ca: c.Authority.(*ca)} })
	_, h := r.joined("node-a")
	agent, admin, lower := svidv1.NewSVIDClient(r.raw(h.cert)), svidv1.NewSVIDClient(r.as(boss)), svidv1.NewSVIDClient(r.as(down))
	names := make([]string, 10_000)
	for i := range names {
		names[i] = fmt.Sprintf("h%d.example", i)
	}
	request := func(tmpl *x509.CertificateRequest) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	foreign := []*url.URL{{Scheme: "spiffe", Host: "other.example", Path: "/x"}}
	sans, other := request(&x509.CertificateRequest{DNSNames: names}), request(&x509.CertificateRequest{URIs: foreign})
	ctx := t.Context()
	mint := func(csr []byte) error {
		_, err := admin.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr})
		return err
	}
	below := func(csr []byte) error {
		_, err := lower.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr})
		return err
	}
	batch := func(csr []byte) error {
		resp, err := agent.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "e-pay", Csr: csr}}})
		if err != nil {
			return err
		}
		return status.Error(codes.Code(resp.Results[0].Status.Code), resp.Results[0].Status.Message)
	}
	tokens := func(n int) error {
		_, err := agent.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "e-pay", Audience: make([]string, n)})
		return err
	}
	_, mintToken := admin.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: "other.example", Path: "/x"}, Audience: []string{"a"}})
	for name, err := range map[string]error{
		"10,000 SANs, minted": mint(sans), "10,000 SANs, below": below(sans), "10,000 SANs, agent": batch(sans),
		"another trust domain, minted": mint(other), "another trust domain, a token": mintToken,
		"another key, minted": mint(spoilt(t)), "another key, below": below(spoilt(t)), "another key, agent": batch(spoilt(t)),
		"truncated, agent": batch(sans[:100]), "truncated, below": below(other[:len(other)/2]), "10,000 audiences": tokens(10_000),
	} {
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.Contains(st.Message(), " ") {
			t.Errorf("%s: %v, want InvalidArgument and a sentence", name, err)
		}
	}
	// The names in a request of an agent count for nothing: only its key does.
	if err := batch(other); status.Code(err) != codes.OK {
		t.Errorf("a request that names another: %v", err)
	}
}
