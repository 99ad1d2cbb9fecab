package translate

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// httpStatus is the status of HTTP for one of gRPC, as google.rpc.Code has it.
func httpStatus(c codes.Code) int {
	switch c {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return 499 // what nginx made usual: the client has closed the request
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// codeOf is the code of gRPC for the status that a service of REST answers with.
// The table of gRPC is for proxies that know nothing of it, and takes 404 for a
// method that is missing; here it is the service that speaks.
func codeOf(status int) codes.Code {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusUnsupportedMediaType, http.StatusRequestURITooLong:
		return codes.InvalidArgument
	case http.StatusUnauthorized:
		return codes.Unauthenticated
	case http.StatusForbidden:
		return codes.PermissionDenied
	case http.StatusNotFound, http.StatusGone:
		return codes.NotFound
	case http.StatusConflict:
		return codes.Aborted
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return codes.DeadlineExceeded
	case http.StatusRequestedRangeNotSatisfiable:
		return codes.OutOfRange
	case http.StatusTooManyRequests, http.StatusRequestEntityTooLarge, http.StatusRequestHeaderFieldsTooLarge:
		return codes.ResourceExhausted
	case 499:
		return codes.Canceled
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return codes.Unimplemented
	case http.StatusInternalServerError:
		return codes.Internal
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return codes.Unavailable
	}
	if status >= 400 && status < 500 {
		return codes.FailedPrecondition
	}
	return codes.Unknown
}

// known is c, if gRPC has such a code.
func known(c codes.Code) codes.Code {
	if c > codes.Unauthenticated {
		return codes.Unknown
	}
	return c
}

// statusText is a google.rpc.Status in JSON, by which a caller of REST is told of
// errors.
func statusText(code codes.Code, text string, details []json.RawMessage) []byte {
	if details == nil {
		details = []json.RawMessage{}
	}
	out, err := json.Marshal(struct {
		Code    codes.Code        `json:"code"`
		Message string            `json:"message"`
		Details []json.RawMessage `json:"details"`
	}{known(code), text, details})
	if err != nil { // details are JSON already
		return []byte(`{"code":13,"message":"the status cannot be written","details":[]}`)
	}
	return out
}

// Refusal is the body of a refusal of the proxy for a caller of REST, who reads
// a google.rpc.Status of the service too.
func Refusal(code int, text, reason, decision string) []byte {
	info := struct {
		Type     string            `json:"@type"`
		Reason   string            `json:"reason"`
		Domain   string            `json:"domain"`
		Metadata map[string]string `json:"metadata,omitempty"`
	}{Type: "type.googleapis.com/google.rpc.ErrorInfo", Reason: reason, Domain: "sallyport"}
	if decision != "" {
		info.Metadata = map[string]string{"decision": decision}
	}
	b, err := json.Marshal(info)
	if err != nil { // texts always have a form
		b = []byte("{}")
	}
	return append(statusText(codes.Code(code), text, []json.RawMessage{b}), '\n')
}

// A failure is what a service of REST says of an error.
type failure struct {
	code    codes.Code
	text    string
	details []json.RawMessage
}

// maxFailure bounds what is read of an answer that is an error.
const maxFailure = 64 << 10

// failureOf reads an error of REST: a google.rpc.Status, the form that Google's
// APIs have around it, or what else has a message in it.
func failureOf(status int, body []byte) failure {
	f := failure{code: codeOf(status), text: http.StatusText(status)}
	var s struct {
		Code    json.RawMessage   `json:"code"`
		Message string            `json:"message"`
		Details []json.RawMessage `json:"details"`
		Error   json.RawMessage   `json:"error"`
		Status  string            `json:"status"`
	}
	if json.Unmarshal(body, &s) != nil {
		return f
	}
	if inner := (struct {
		Message string            `json:"message"`
		Status  string            `json:"status"`
		Details []json.RawMessage `json:"details"`
	}{}); json.Unmarshal(s.Error, &inner) == nil && inner.Message != "" {
		s.Message, s.Status, s.Details, s.Code = inner.Message, inner.Status, inner.Details, nil
	} else if text := ""; s.Message == "" && json.Unmarshal(s.Error, &text) == nil {
		s.Message = text
	}
	if s.Message != "" {
		f.text = clip(s.Message)
	}
	if c, ok := codeNamed(s.Code, s.Status); ok {
		f.code, f.details = c, s.Details
	}
	return f
}

// codeNamed reads a code that an error names: a number of gRPC, or its name. A
// number that is a status of HTTP says nothing new.
func codeNamed(number json.RawMessage, name string) (codes.Code, bool) {
	var n uint32
	if json.Unmarshal(number, &n) == nil && n > 0 && n <= uint32(codes.Unauthenticated) {
		return codes.Code(n), true
	}
	var c codes.Code
	if name != "" && c.UnmarshalJSON([]byte(strconv.Quote(name))) == nil && c != codes.OK {
		return c, true
	}
	return 0, false
}

// clip bounds a text that stands in a trailer.
func clip(s string) string {
	const most = 1 << 10
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// escapeMessage is the percent encoding of grpc-message.
func escapeMessage(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// unescapeMessage reads it; what is broken stays as it is.
func unescapeMessage(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b.WriteByte(byte(n))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return strings.ToValidUTF8(b.String(), "\uFFFD")
}

var errTimeout = errors.New("is not a time")

// timeoutOf reads how long the caller waits, and has it in the field that is read
// next: X-Server-Timeout, seconds, for REST, where grpc-timeout counts too.
func timeoutOf(h http.Header, rest bool) (time.Duration, bool, error) {
	const field, seconds = "Grpc-Timeout", "X-Server-Timeout"
	text := h.Get(field)
	if rest {
		h.Del(field)
		if s := h.Get(seconds); s != "" {
			f, err := strconv.ParseFloat(s, 64)
			if err != nil || math.IsNaN(f) || f < 0 || f > 1e9 {
				return 0, false, fmt.Errorf("%s %w: write seconds, such as 1.5", seconds, errTimeout)
			}
			return min(time.Duration(f*float64(time.Second)), maxTimeout), true, nil
		}
	}
	if text == "" {
		return 0, false, nil
	}
	d, err := parseTimeout(text)
	if err != nil {
		return 0, false, fmt.Errorf("%s %w", field, err)
	}
	if rest {
		h.Set(seconds, strconv.FormatFloat(d.Seconds(), 'f', -1, 64))
	}
	return min(d, maxTimeout), true, nil
}

// parseTimeout reads the value of grpc-timeout: at most eight digits and a unit.
func parseTimeout(s string) (time.Duration, error) {
	unit := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond}
	if len(s) < 2 || len(s) > 9 {
		return 0, errTimeout
	}
	u, ok := unit[s[len(s)-1]]
	digits := s[:len(s)-1]
	if !ok || strings.Trim(digits, "0123456789") != "" {
		return 0, errTimeout
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0, errTimeout
	}
	if n > int64(maxTimeout/u) {
		return maxTimeout, nil
	}
	return time.Duration(n) * u, nil
}
