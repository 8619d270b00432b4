"""Operators of the default domain through which nothing can be cut, each with the reason that `inspect` prints.

An operator that stands neither here nor under a rule is locked too; a test fails when onnx brings a new one, so that
somebody decides.
"""

REASONS = {
    "it makes a tensor of a size that is read as it is": """
        Bernoulli Constant ConstantOfShape EyeLike Multinomial RandomNormal RandomNormalLike RandomUniform
        RandomUniformLike Range BlackmanWindow HammingWindow HannWindow MelWeightMatrix AffineGrid
    """,
    "positions are chosen by data or by number": """
        Compress NonMaxSuppression NonZero OneHot TensorScatter Unique CenterCropPad Col2Im MaxUnpool
    """,
    "its positions are mixed": "Det DFT STFT CausalConvWithState LinearAttention SwiGLU",
    "it holds a graph of its own": "If Loop Scan SequenceMap",
    "it holds sequences or optionals": """
        Optional OptionalGetElement OptionalHasElement ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty
        SequenceErase SequenceInsert SequenceLength SplitToSequence
    """,
    "it computes in integers, in a way that isn't spelt out as pairs": """
        QLinearConv QLinearMatMul
    """,
    "classes stay": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it reads strings or files": """
        ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer
    """,
}
LOCKED = {name: reason for reason, names in REASONS.items() for name in names.split()}
