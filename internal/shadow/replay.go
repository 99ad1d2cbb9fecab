package shadow

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"sallyport/internal/archive"
	"sallyport/internal/telemetry"
)

// A Replay makes archived calls again, to a target of its own.
type Replay struct {
	// Target has scheme and host.
	Target *url.URL
	Client *http.Client
	// Writes sends calls that change things, too.
	Writes bool
	// Answer is the largest answer that is read, bytes.
	Answer int64
}

// ErrSkipped is why a record is not sent.
var ErrSkipped = errors.New("not sent")

// Send makes the call of a record again, marked as a copy. What was taken out of
// the request is left out.
func (r *Replay) Send(ctx context.Context, rec *archive.Record) (*archive.Answer, error) {
	q := rec.Request
	switch {
	case q == nil:
		return nil, fmt.Errorf("%w: the record has no request", ErrSkipped)
	case !r.Writes && !Safe([]byte(q.Method)):
		return nil, fmt.Errorf("%w: %s may change something", ErrSkipped, q.Method)
	case q.Omitted != "":
		return nil, fmt.Errorf("%w: its body was left out", ErrSkipped)
	}
	u := *r.Target
	u.Opaque, u.RawQuery = q.Path, q.Query // as it was said, not as it would be escaped
	if !strings.HasPrefix(q.Path, "/") || strings.HasPrefix(q.Path, "//") {
		return nil, fmt.Errorf("%w: %q is no path", ErrSkipped, q.Path)
	}
	req, err := http.NewRequestWithContext(ctx, q.Method, r.Target.String(), bytes.NewReader(q.Body))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSkipped, err)
	}
	req.URL, req.Host = &u, q.Host
	for _, f := range q.Headers {
		if name := strings.ToLower(f[0]); f[1] != archive.Redacted && !passing[name] {
			req.Header.Add(f[0], f[1])
		}
	}
	req.Header.Set(Marker, "1")
	var t telemetry.Trace
	if id, err := hex.DecodeString(rec.Trace); err == nil {
		copy(t.ID[:], id)
	}
	req.Header.Set("Traceparent", string(t.Child().AppendTraceparent(nil)))
	if strings.HasPrefix(q.Get("content-type"), "application/grpc") {
		req.Header.Set("Te", "trailers")
	}
	resp, err := r.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, r.Answer+1))
	if err != nil {
		return nil, err
	}
	if int64(len(body)) > r.Answer {
		return nil, fmt.Errorf("the answer has more than %d bytes", r.Answer)
	}
	return &archive.Answer{Status: resp.StatusCode, Message: archive.Message{Headers: fields(resp.Header), Body: body, Trailers: fields(resp.Trailer)}}, nil
}
