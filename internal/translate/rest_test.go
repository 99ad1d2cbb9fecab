package translate

import (
	"encoding/base64"
	"encoding/binary"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"sallyport/internal/translate/translatetest"
)

// restShop runs a Translator before the shop that speaks REST.
func restShop(t testing.TB) *Translator {
	s := httptest.NewServer(translatetest.REST())
	t.Cleanup(s.Close)
	return start(t, s.Listener.Addr().String(), rest)
}

// ended is the status of a call, in the head or in the trailers.
func ended(resp *http.Response) (string, string) {
	h := resp.Trailer
	if h.Get("Grpc-Status") == "" {
		h = resp.Header
	}
	return h.Get("Grpc-Status"), unescapeMessage(h.Get("Grpc-Message"))
}

func TestCallsOfGRPCReachAServiceOfREST(t *testing.T) {
	tr := restShop(t)
	for _, c := range []struct{ name, method, in, want, status, message string }{
		{"a path variable and a query", "Get", `{"id":"a","count":3}`, `{"id":"a","note":"GET/v1/items/a?count=3user=alicetimeout="}`, "0", ""},
		{"a value to be escaped", "Get", `{"id":"a b"}`, `{"id":"ab","note":"GET/v1/items/a%20buser=alicetimeout="}`, "0", ""},
		{"a body", "Put", `{"id":"z","price":"7"}`, `{"id":"z","price":"7"}`, "0", ""},
		{"no rule of its own", "Plain", `{"id":"q"}`, `{"id":"q"}`, "0", ""},
		{"an answer without a body", "Get", `{"id":"empty"}`, `{}`, "0", ""},
		{"a field that nobody knows", "Get", `{"id":"more"}`, `{"id":"more"}`, "0", ""},
		{"a page", "Get", `{"id":"html"}`, "", "13", `the service answered with "text/html", not with JSON`},
		{"an error of Google's form", "Get", `{"id":"google"}`, "", "9", "locked"},
		{"an answer too large", "Get", `{"id":"huge"}`, "", "8", "the answer of the service has more than 4194304 bytes"},
		{"another path", "Get", `{"id":"../admin"}`, "", "3", "a field that stands in the path has a value that no path can have"},
		{"the path above", "Get", `{"id":".."}`, "", "3", "a field that stands in the path has a value that no path can have"},
		{"a stream", "Watch", `{"id":"a"}`, "", "12", "the method streams, and the service speaks REST"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := "GetRequest"
			if c.method == "Put" {
				in = "Item"
			}
			resp, body := do(t, tr, request("POST", "/shop.v1.Shop/"+c.method, "application/grpc", frame(t, translatetest.Message(t, in, c.in))))
			status, message := ended(resp)
			if resp.StatusCode != 200 || status != c.status || message != c.message {
				t.Fatalf("%d, status %q %q, want %q %q", resp.StatusCode, status, message, c.status, c.message)
			}
			if c.status != "0" {
				return
			}
			m := dynamicpb.NewMessage(translatetest.Service(t).Methods().ByName("Get").Output())
			if n := binary.BigEndian.Uint32([]byte(body)[1:]); int(n)+prefix != len(body) || proto.Unmarshal([]byte(body)[prefix:], m) != nil {
				t.Fatalf("not one message: %q", body)
			}
			if got := translatetest.JSONOf(m); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestAStatusOfRESTIsOneOfGRPC(t *testing.T) {
	tr := restShop(t)
	for status, want := range map[int]codes.Code{
		400: codes.InvalidArgument, 401: codes.Unauthenticated, 403: codes.PermissionDenied, 404: codes.NotFound, 405: codes.Unimplemented,
		408: codes.DeadlineExceeded, 409: codes.Aborted, 412: codes.FailedPrecondition, 418: codes.FailedPrecondition, 429: codes.ResourceExhausted,
		302: codes.Unknown, 500: codes.Internal, 501: codes.Unimplemented, 502: codes.Unavailable, 503: codes.Unavailable, 504: codes.DeadlineExceeded, 599: codes.Unknown,
	} {
		resp, _ := do(t, tr, request("POST", translatetest.Get, "application/grpc", frame(t, translatetest.Message(t, "GetRequest", `{"id":"`+strconv.Itoa(status)+`"}`))))
		code, message := ended(resp)
		if code != strconv.Itoa(int(want)) || message != "said with "+strconv.Itoa(status) {
			t.Errorf("%d is %s %q, want %d", status, code, message, want)
		}
	}
}

func TestADetailOfRESTReachesACallerOfGRPC(t *testing.T) {
	resp, _ := do(t, restShop(t), request("POST", translatetest.Get, "application/grpc", frame(t, translatetest.Message(t, "GetRequest", `{"id":"google"}`))))
	bin := resp.Header.Get("Grpc-Status-Details-Bin")
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(bin, "="))
	s := new(status.Status)
	if err != nil || proto.Unmarshal(b, s) != nil || len(s.Details) != 1 || !strings.HasSuffix(s.Details[0].TypeUrl, "ErrorInfo") {
		t.Errorf("%q is %v, %v", bin, s, err)
	}
}

func TestTheTimeOfACallerEndsACallOfREST(t *testing.T) {
	r := request("POST", translatetest.Get, "application/grpc", frame(t, translatetest.Message(t, "GetRequest", `{"id":"hang"}`)))
	r.Header.Set("Grpc-Timeout", "50m")
	resp, _ := do(t, restShop(t), r)
	if code, _ := ended(resp); code != "4" {
		t.Errorf("status %q %v", code, resp.Header)
	}
}
