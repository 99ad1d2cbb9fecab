package translate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport/internal/http1"
)

// A leg brings a call that vanguard has translated to the service.
type leg struct {
	table *table
	offer *Offer
	log   *slog.Logger
}

// ServeHTTP implements http.Handler for vanguard.
func (l *leg) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if p, ok := r.Context().Value(probeKey{}).(*probe); ok {
		p.method = r.URL.Path
		return
	}
	x, ok := r.Context().Value(callKey{}).(*call)
	if !ok {
		panic("translate: a call that nobody judged")
	}
	if l.offer.spec.To == toGRPC {
		l.toGRPC(w, r, x)
	} else {
		l.toREST(w, r, x)
	}
}

func (l *leg) toGRPC(w http.ResponseWriter, r *http.Request, x *call) {
	if r.URL.Path != x.method {
		l.log.Error("a path means two methods", "judged", x.method, "translated", r.URL.Path)
		x.take()
		x.fail(codes.Internal, "the call is not the one that was judged", nil)
		return
	}
	streams := x.kind == plain && x.desc.IsStreamingServer()
	// All of the request is looked at before the service hears of it.
	b, err := io.ReadAll(r.Body)
	if err != nil || len(b) < prefix {
		x.unread(err)
		return
	}
	out, err := http.NewRequestWithContext(r.Context(), http.MethodPost, "http://"+hostOf(r)+x.method, bytes.NewReader(b))
	if err != nil {
		x.reject(codes.Internal, err.Error())
		return
	}
	out.Header = r.Header
	if streams {
		out.Header.Del("Grpc-Accept-Encoding") // what is read here is not packed
	}
	if x.kind == plain {
		for _, name := range []string{"Accept", "Accept-Language", "X-Server-Timeout"} {
			out.Header.Del(name)
		}
	}
	x.reached = true
	resp, err := l.offer.transport.RoundTrip(out)
	if err != nil {
		code, text := unreached(r.Context(), err)
		l.refuse(w, code, text)
		return
	}
	defer resp.Body.Close()
	correct(resp.Header)
	if streams {
		x.stream(r.Context(), resp)
		return
	}
	pass(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, err = io.Copy(w, resp.Body)
	correct(resp.Trailer)
	if err != nil {
		code, text := unreached(r.Context(), err)
		resp.Trailer = http.Header{"Grpc-Status": {strconv.Itoa(int(code))}, "Grpc-Message": {escapeMessage(text)}}
	}
	for name, values := range resp.Trailer {
		w.Header()[http.TrailerPrefix+name] = values
		if x.kind == plain && !strings.HasPrefix(name, "Grpc-") {
			x.w.Header()["Grpc-Trailer-"+name] = values // REST has its answer in one piece
		}
	}
}

// sameTime is by how much a service may find sooner than we that the time is up.
const sameTime = 20 * time.Millisecond

// refuse answers in place of a service of gRPC.
func (l *leg) refuse(w http.ResponseWriter, code codes.Code, text string) {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", strconv.Itoa(int(code)))
	w.Header().Set("Grpc-Message", escapeMessage(text))
	w.WriteHeader(http.StatusOK)
}

// unreached says what came between.
func unreached(ctx context.Context, err error) (codes.Code, string) {
	until, timed := ctx.Deadline()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded), timed && ctx.Err() == nil && time.Until(until) < sameTime:
		return codes.DeadlineExceeded, "the service did not answer in the time that the caller gave"
	case ctx.Err() != nil:
		return codes.Canceled, "the caller has gone"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return codes.Unavailable, "the service closed the connection"
	}
	return codes.Unavailable, "the service cannot be reached"
}

// correct has a status that gRPC does not know be unknown: vanguard looks it up
// in a table that ends there.
func correct(h http.Header) {
	s := h.Get("Grpc-Status")
	if s == "" {
		return
	}
	if n, err := strconv.ParseUint(s, 10, 32); err != nil || n > uint64(codes.Unauthenticated) {
		h.Set("Grpc-Status", strconv.Itoa(int(codes.Unknown)))
	}
}

// pass adds the fields of an answer, without those of the connection.
func pass(to, from http.Header) {
	for name, values := range from {
		switch name {
		case "Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade", "Content-Length":
		default:
			to[name] = values
		}
	}
}

func hostOf(r *http.Request) string {
	if r.Host != "" {
		return r.Host
	}
	return "service"
}

func (l *leg) toREST(w http.ResponseWriter, r *http.Request, x *call) {
	target, err := forwarded(r)
	if err != nil {
		x.reject(codes.InvalidArgument, err.Error())
		return
	}
	b, err := io.ReadAll(r.Body)
	if err != nil || x.wrote {
		x.unread(err)
		return
	}
	out, err := http.NewRequestWithContext(r.Context(), r.Method, target.String(), bytes.NewReader(b))
	if err != nil {
		x.reject(codes.Internal, err.Error())
		return
	}
	out.Header = r.Header
	for _, name := range []string{"Te", "Trailer", "Accept-Encoding", "Content-Length"} {
		out.Header.Del(name)
	}
	out.Header.Set("Accept", "application/json")
	if len(b) == 0 {
		out.Header.Del("Content-Type")
		out.Body = http.NoBody
	}
	x.reached = true
	resp, err := l.offer.transport.RoundTrip(out)
	if err != nil {
		code, text := unreached(r.Context(), err)
		tell(w, failure{code: code, text: text})
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxMessage+1))
	if err != nil {
		code, text := unreached(r.Context(), err)
		tell(w, failure{code: code, text: text})
		return
	}
	x.answerREST(w, resp, body)
}

// answerREST hands the answer of a service of REST to vanguard.
func (x *call) answerREST(w http.ResponseWriter, resp *http.Response, body []byte) {
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	raw := x.desc.Output().FullName() == httpBody
	switch {
	case resp.StatusCode/100 != 2:
		tell(w, failureOf(resp.StatusCode, body[:min(len(body), maxFailure)]))
		return
	case len(body) > MaxMessage:
		tell(w, failure{code: codes.ResourceExhausted, text: fmt.Sprintf("the answer of the service has more than %d bytes", MaxMessage)})
		return
	case len(body) == 0 && !raw:
		body, media = []byte("{}"), "application/json" // such as 204
	case media != "application/json" && !raw:
		tell(w, failure{code: codes.Internal, text: fmt.Sprintf("the service answered with %.80q, not with JSON", media)})
		return
	}
	pass(w.Header(), resp.Header)
	if !raw {
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body) // vanguard says what is wrong with it
}

// httpBody is the message that stands for a body of any type.
const httpBody = "google.api.HttpBody"

// tell has vanguard make an error of a failure. It reads what it knows, and takes
// the status of HTTP otherwise.
func tell(w http.ResponseWriter, f failure) {
	s := &status.Status{Code: int32(known(f.code)), Message: f.text}
	for _, d := range f.details {
		a := new(anypb.Any)
		if protojson.Unmarshal(d, a) == nil && proto.Size(s)+proto.Size(a) < maxDetails {
			s.Details = append(s.Details, a)
		}
	}
	b, err := protojson.Marshal(s)
	if err != nil {
		b = statusText(f.code, "", []json.RawMessage{})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpStatus(f.code))
	_, _ = w.Write(b) // into memory
}

// maxDetails bounds the details of an error, bytes, which stand in a trailer.
const maxDetails = 4 << 10

// forwarded is the target at a service of REST. Vanguard writes values of the
// message into the path as they are: what would be another path there, or be
// refused on its way in, is refused here.
func forwarded(r *http.Request) (*url.URL, error) {
	path := r.URL.Path
	clean, err := http1.CleanPath(nil, []byte(path), false)
	if err != nil || string(clean) != path {
		return nil, errors.New("a field that stands in the path has a value that no path can have")
	}
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return nil, err
	}
	return &url.URL{Scheme: "http", Host: hostOf(r), Path: decoded, RawPath: path, RawQuery: r.URL.RawQuery}, nil
}
