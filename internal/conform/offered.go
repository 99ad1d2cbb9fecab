package conform

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"sallyport/internal/jose"
)

// witMusts are the demands on WIT-SVIDs that a workload can see.
var witMusts = []int{56, 57, 58, 59, 60, 61, 62, 63, 66, 70, 120}

// wit asks for WIT-SVIDs, which need not be offered.
func (p *probe) wit() {
	r, err := first(p.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.WITSVIDResponse], error) {
		return p.client.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	})
	b, berr := first(p.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.WITBundlesResponse], error) {
		return p.client.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
	})
	if err != nil {
		p.say("FetchWITSVID", code(err, codes.Unimplemented), 119)
		p.say("FetchWITBundles", code(berr, codes.Unimplemented), 119)
		p.skip("WIT-SVIDs are not offered here", slices.Concat(witMusts, []int{64, 65, 67, 68, 69, 71})...)
		return
	}
	p.skip("WIT-SVIDs are offered here", 119)
	p.say("FetchWITSVID", fails(len(r.Svids) > 0, "the answer has no SVID"), 120)
	p.say("FetchWITBundles", berr, 120)
	kids := p.witKeys(b.GetBundles()[p.own])
	for _, s := range r.Svids {
		p.witToken(s, kids)
	}
}

func (p *probe) witKeys(doc string) (kids []string) {
	set, err := jose.ParseObject([]byte(doc))
	keys, _ := set["keys"].([]any)
	if err == nil && len(keys) == 0 {
		err = errors.New("it has no keys")
	}
	what := "the WIT bundle of " + p.own
	p.say(what, err, 70, 120)
	for _, v := range keys {
		o, _ := v.(map[string]any)
		kid, _ := o["kid"].(string)
		p.say(what, fails(o["use"] == "wit-svid", "a key has use %.50v", o["use"]), 70)
		p.say(what, fails(kid != "" && !slices.Contains(kids, kid), "the kid %.50q is empty or stands twice", kid), 56, 70)
		kids = append(kids, kid)
	}
	return kids
}

func (p *probe) witToken(s *workload.WITSVID, kids []string) {
	what := "the WIT-SVID of " + s.SpiffeId
	t, err := readToken(s.WitSvid)
	p.say(what, err, 56, 120)
	if err != nil {
		return
	}
	kid, _ := t.header["kid"].(string)
	alg, _ := t.header["alg"].(string)
	_, nine := algorithms[alg]
	cnf, _ := t.claims["cnf"].(map[string]any)
	key, _ := cnf["jwk"].(map[string]any)
	keyAlg, _ := key["alg"].(string)
	_, keyNine := algorithms[keyAlg]
	p.say(what, fails(slices.Contains(kids, kid), "its kid %.50q is not in the bundle", kid), 56)
	p.say(what, fails(t.header["typ"] == "wit+jwt", "its typ is %.50v", t.header["typ"]), 57)
	p.say(what, fails(nine, "its alg is %.20q", alg), 58)
	p.say(what, fails(t.claims["sub"] == s.SpiffeId, "its sub is %.100v", t.claims["sub"]), 59)
	p.say(what, fails(len(cnf) > 0, "cnf is missing"), 60)
	p.say(what, fails(keyNine, "cnf.jwk.alg is %.20q", keyAlg), 61)
	p.say(what, fails(t.claims["exp"] != nil, "exp is missing"), 63)
	_, has := t.claims["aud"]
	p.say(what, fails(!has, "it has aud"), 66)
	if t.claims["jti"] == nil {
		p.skip("the WIT-SVIDs here have no jti", 62)
	}
}

// apiMethods are those of the Workload API's service.
var apiMethods = []string{
	"FetchJWTBundles", "FetchJWTSVID", "FetchWITBundles", "FetchWITSVID", "FetchX509Bundles", "FetchX509SVID", "ValidateJWTSVID",
}

// services asks by reflection, which an endpoint should offer, whether the
// service is the one of the specification.
func (p *probe) services() {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	got, err := methods(ctx, reflectionpb.NewServerReflectionClient(p.cc), "SpiffeWorkloadAPI")
	if err != nil {
		p.skip("this endpoint does not offer gRPC reflection: "+status.Convert(err).Message(), 103)
		return
	}
	var more error
	for _, m := range got {
		if !slices.Contains(apiMethods, m) {
			more = fmt.Errorf("the service has the method %.100s besides", m)
		}
	}
	p.say("reflection", more, 103)
}

// methods are those of a service, by reflection.
func methods(ctx context.Context, c reflectionpb.ServerReflectionClient, service string) ([]string, error) {
	s, err := c.ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}}); err != nil {
		return nil, err
	}
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	if e := r.GetErrorResponse(); e != nil {
		return nil, status.Error(codes.Code(e.ErrorCode), e.ErrorMessage) //nolint:gosec // a small number
	}
	var out []string
	for _, raw := range r.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var f descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &f); err != nil {
			return nil, err
		}
		for _, sv := range f.GetService() {
			if sv.GetName() == service {
				for _, m := range sv.GetMethod() {
					out = append(out, m.GetName())
				}
			}
		}
	}
	if len(out) == 0 {
		return nil, errors.New("the descriptor has no such service")
	}
	return out, nil
}

// whole looks whether a message says everything: two streams that begin now,
// and, with Wait, the second message of a stream.
func (p *probe) whole() {
	one := func(r *workload.X509SVIDResponse) []string {
		var ids []string
		for _, s := range r.GetSvids() {
			ids = append(ids, s.SpiffeId+fmt.Sprint(len(s.Bundle) > 0, len(s.X509Svid) > 0, len(s.X509SvidKey) > 0))
		}
		ids = append(ids, slices.Collect(maps.Keys(r.GetFederatedBundles()))...)
		slices.Sort(ids)
		return ids
	}
	ctx, cancel := context.WithTimeout(p.ctx, max(p.cfg.Wait, patience))
	defer cancel()
	s, err := p.openX509(ctx)
	if err != nil {
		p.say("a second stream", err, 106)
		return
	}
	a, err := s.Recv()
	if err != nil {
		p.say("a second stream", err, 106)
		return
	}
	b, err := first(p.ctx, p.openX509)
	if err == nil {
		err = fails(slices.Equal(one(a), one(b)), "it says %q, another %q", one(a), one(b))
	}
	p.say("a third stream", err, 106)
	if p.cfg.Wait == 0 {
		return
	}
	if next, err := s.Recv(); err == nil {
		p.say("the second message of a stream", fails(slices.Equal(one(a), one(next)), "it says %q after %q", one(next), one(a)), 106)
	} else if ctx.Err() == nil {
		p.say("a stream that waited for its second message", err, 106)
	}
}
